"""The order of axes is believed where their names say it, and doubted where their sizes do."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn import ProblemError, import_arrays, synthesise
from oocattn.cli.main import main
from oocattn.problem.options import ProblemOptions
from oocattn.storage.inputs.dataset import Dataset, pose


def write(path: Path, names: dict[str, Any], shape: tuple[int, ...] = (1, 4, 20, 8), zarr_format: int = 3) -> Path:
    """A dataset of equal arrays, those in `names` with dimension names."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for name in "qkv":
        given = {"dimension_names": names.get(name)} if zarr_format == 3 else {}
        array = group.create_array(name, data=np.ones(shape, "float32"), chunks=shape, **given)
        if zarr_format == 2 and name in names:
            array.attrs["_ARRAY_DIMENSIONS"] = names[name]
    return path


RIGHT = [
    "batch head token head_dim",
    "batch q_head sequence dim",
    "B H N D",
    "b h s d",
    "Batch Heads Seq-Len Head_Dim",
    "b kv_heads position features",
    "batch num_heads time channel",
    "b n s h",  # n heads of h dimensions
    "b h q d",
    "b h n k",  # n and h may be two things each: not believed
    "N H L E",  # as torch has it: a batch of n
    "batch kv_group token_index d_k",
    "x y z w",
    "dim_0 dim_1 dim_2 dim_3",
    "batch token head layer",
    "batch token token head_dim",
    "head head head head",
]

OTHERS = [
    "batch token head head_dim",
    "b n h d",
    "B T N H",  # as JAX has it: n heads of h dimensions
    "b q h d",
    "b m h k",
    "batch_size seq_len n_heads head-dim",
    "N L H E",
    "batch seqlen_q heads_q dim_qk",
    "sample source-token attention.heads value_dim",
    "batch position kv_head channels",
]
"""Names of [B, N, H, D]."""

WRONG = {
    "sequence batch head dim": "N, B, H, D",
    "batch head dim token": "B, H, D, N",
    "head batch time feature": "H, B, N, D",
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("names", RIGHT)
def test_names_that_fit_or_are_not_known_are_let_pass(tmp_path: Path, names: str, zarr_format: int) -> None:
    Dataset.open(write(tmp_path, {name: names.split() for name in "qkv"}, zarr_format=zarr_format))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("names", OTHERS)
def test_names_of_another_layout_are_believed(tmp_path: Path, names: str, zarr_format: int) -> None:
    dataset = Dataset.open(write(tmp_path, {name: names.split() for name in "qkv"}, zarr_format=zarr_format))
    assert [spec.shape for spec in dataset.specs] == [(1, 20, 4, 8)] * 3


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("names", "order"), WRONG.items())
def test_names_of_an_order_that_is_no_layout_are_refused(tmp_path: Path, names: str, order: str, zarr_format: int) -> None:
    dataset = write(tmp_path, {name: names.split() for name in "qkv"}, zarr_format=zarr_format)
    message = re.escape(f"it is [{order}] ({names.replace(' ', ', ')}): expected one of bhnd, bnhd")
    with pytest.raises(ProblemError, match=rf"dimension names of q .*{message}.*write it transposed"):
        oocattn.attention(dataset, tmp_path / "result.zarr")


def test_two_kinds_of_names_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"q": ["batch", "head", "token", "dim"]})
    zarr.open_array(dataset / "q", mode="r+").attrs["_ARRAY_DIMENSIONS"] = ["batch", "token", "head", "dim"]
    with pytest.raises(ProblemError, match=r"say that it is \[B, H, N, D\] .* and \[B, N, H, D\]"):
        Dataset.open(dataset)


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        ("token head dim", (20, 4, 8)),
        ("n h d", (20, 4, 8)),
        ("h n d", (4, 20, 8)),
        ("batch token dim", (4, 20, 8)),
    ],
)
def test_three_dimensions_are_named_as_well(tmp_path: Path, names: str, shape: tuple[int, ...]) -> None:
    dataset = write(tmp_path, {name: names.split() for name in "qkv"}, shape=shape)
    assert Dataset.open(dataset).specs[0].shape == (4, 20, 8)


@pytest.mark.parametrize(
    ("names", "believed"),
    [
        (["batch", None, "heads", "dim"], True),
        ([None, "token", "heads", "dim"], True),
        (["batch", "heads", None, "dim"], False),
        ([None, None, "heads", None], False),
    ],
)
def test_names_of_some_axes_are_believed_where_the_others_follow(
    tmp_path: Path, names: list[str | None], believed: bool
) -> None:
    found = Dataset.open(write(tmp_path, dict.fromkeys("qkv", names))).specs[0].shape
    assert found == ((1, 20, 4, 8) if believed else (1, 4, 20, 8))


@pytest.mark.parametrize("names", [7, "bnhd", [], ["batch"], [1, 2, 3, 4], [None] * 4, {"a": 1}, [["b"], "n", "h", "d"]])
def test_names_may_be_anything(tmp_path: Path, names: Any) -> None:
    Dataset.open(write(tmp_path, dict.fromkeys("qkv", names), zarr_format=2))


def test_verify_believes_the_names_as_well(tmp_path: Path) -> None:
    dataset, result = write(tmp_path / "dataset.zarr", {}), tmp_path / "result.zarr"
    oocattn.attention(dataset, result, kernel="cpu")
    for name in "qkv":
        zarr.open_array(dataset / name, mode="r+").attrs["_ARRAY_DIMENSIONS"] = ["batch", "token", "head", "dim"]
    with pytest.raises(ProblemError, match=r"poses another problem .*\(query heads 4, now 20; .*; queries 20, now 4"):
        oocattn.verify(result)


def test_our_own_arrays_are_named(tmp_path: Path) -> None:
    synthesise(tmp_path / "dataset.zarr", tokens=20, heads=4, kv_heads=2, head_dim=8, dtype="float32")
    result = oocattn.attention(tmp_path / "dataset.zarr", tmp_path / "result.zarr", kernel="cpu")
    group = zarr.open_group(tmp_path / "dataset.zarr")
    found = {name: group[name].metadata.dimension_names for name in "qkv"}
    assert found["q"] == result.out.metadata.dimension_names == ("batch", "query_head", "token", "head_dim")
    assert found["k"] == found["v"] == ("batch", "kv_head", "token", "head_dim")
    assert result.lse.metadata.dimension_names == ("batch", "query_head", "token")


MANY_HEADS = r"\[1, 32, 4, 8\] is taken for \[B, H, N, D\], 32 heads x 4 tokens: .* it is \[B, N, H, D\], .*layout(='| )bnhd"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Those that doubt an order of dimensions; a machine that is busy while it is measured has others."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in found if "is taken for" in text]


def test_more_heads_than_tokens_are_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(4, heads=32, kv_heads=32))
    for work in (
        lambda: oocattn.plan(dataset, kernel="cpu"),
        lambda: oocattn.attention(dataset, tmp_path / "result.zarr", kernel="cpu"),
        lambda: oocattn.verify(tmp_path / "result.zarr"),
        lambda: main(["plan", str(dataset), "--kernel", "cpu"]),
        lambda: main(["run", str(dataset), str(tmp_path / "other.zarr"), "--kernel", "cpu"]),
    ):
        caplog.clear()
        work()
        (warned,) = warnings_of(caplog)
        assert re.search(MANY_HEADS, warned)


@pytest.mark.parametrize("tokens", [4, 5])
def test_as_many_heads_as_tokens_are_not_doubted(tmp_path: Path, tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    oocattn.plan(write_dataset(tmp_path, normal_arrays(tokens, heads=4)), kernel="cpu")
    assert not warnings_of(caplog)


def test_few_queries_of_many_keys_are_not_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = normal_arrays(20, heads=8)
    pose(Dataset.open(write_dataset(tmp_path, (q[:, :, :2], k, v))), ProblemOptions())
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("shape", "layout", "other"),
    [
        ((1, 32, 4, 8), "bhnd", "bnhd"),
        ((1, 4, 32, 8), "bnhd", "bhnd"),
        ((32, 4, 8), "hnd", "nhd"),
        ((4, 32, 8), "nhd", "hnd"),
        ((1, 4, 32, 8), "bhnd", None),
        ((1, 32, 4, 8), "bnhd", None),
    ],
)
def test_an_import_of_more_heads_than_tokens_is_doubted(
    tmp_path: Path, shape: tuple[int, ...], layout: str, other: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "q.npy", np.ones(shape, np.float32))
    options = [f"--{name}={tmp_path / 'q.npy'}" for name in "qkv"]
    assert main(["import", str(tmp_path / "imported.zarr"), *options, "--layout", layout]) == 0
    import_arrays(tmp_path / "other.zarr", q=tmp_path / "q.npy", k=tmp_path / "q.npy", v=tmp_path / "q.npy", layout=layout)
    warned = warnings_of(caplog)
    assert len(warned) == (0 if other is None else 2)
    letters = f"[{', '.join(layout.upper())}]"
    assert all(f"q.npy) {list(shape)} is taken for {letters}, 32 heads x 4 tokens" in text for text in warned)
    assert all(
        f"{layout})" in text for text, layout in zip(warned, (f"--layout {other}", f"layout={other!r}"), strict=False)
    )
