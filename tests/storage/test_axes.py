"""Arrays whose axes are in another order are refused where their names say it, and doubted where their sizes do."""

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

WRONG = {
    "batch token head head_dim": ("B, N, H, D", "bnhd"),
    "b n h d": ("B, N, H, D", "bnhd"),
    "B T N H": ("B, N, H, D", "bnhd"),  # as JAX has it: n heads of h dimensions
    "b q h d": ("B, N, H, D", "bnhd"),
    "b m h k": ("B, N, H, D", "bnhd"),
    "batch_size seq_len n_heads head-dim": ("B, N, H, D", "bnhd"),
    "N L H E": ("B, N, H, D", "bnhd"),
    "batch seqlen_q heads_q dim_qk": ("B, N, H, D", "bnhd"),
    "sample source-token attention.heads value_dim": ("B, N, H, D", "bnhd"),
    "batch position kv_head channels": ("B, N, H, D", "bnhd"),
    "sequence batch head dim": ("N, B, H, D", None),
    "batch head dim token": ("B, H, D, N", None),
    "head batch time feature": ("H, B, N, D", None),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("names", RIGHT)
def test_names_that_fit_or_are_not_known_are_let_pass(tmp_path: Path, names: str, zarr_format: int) -> None:
    Dataset.open(write(tmp_path, {name: names.split() for name in "qkv"}, zarr_format=zarr_format))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("names", "order", "layout"), [(names, *found) for names, found in WRONG.items()])
def test_names_of_another_order_are_refused(
    tmp_path: Path, names: str, order: str, layout: str | None, zarr_format: int
) -> None:
    dataset = write(tmp_path, {name: names.split() for name in "qkv"}, zarr_format=zarr_format)
    said = re.escape(f"q is [{order}] ({names.replace(' ', ', ')}); k is [{order}]")
    message = rf"{said} .*expected are \[B, H, N, D\] .*write the array transposed"
    with pytest.raises(ProblemError, match=message) as refused:
        oocattn.plan(dataset)
    assert (f"oocattn import --layout {layout}" in str(refused.value)) == (layout is not None)
    with pytest.raises(ProblemError, match="dimension names"):
        oocattn.attention(dataset, tmp_path / "result.zarr")


def test_names_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    names = {"q": ["batch", "head", "token", "dim"], "k": ["batch", "token", "head", "dim"], "v": ["x", "y", "z", "w"]}
    with pytest.raises(
        ProblemError, match=r"say that q is \[B, H, N, D\] \(.*\); k is \[B, N, H, D\] \(.*\); expected"
    ) as refused:
        oocattn.plan(write(tmp_path, names))
    assert "v is" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "refused"), [("token head dim", True), ("n h d", True), ("h n d", False), ("batch token dim", False)]
)
def test_three_dimensions_are_named_as_well(tmp_path: Path, names: str, refused: bool) -> None:
    dataset = write(tmp_path, {name: names.split() for name in "qkv"}, shape=(4, 20, 8))
    if refused:
        with pytest.raises(ProblemError, match=r"q is \[N, H, D\].*\[H, N, D\].*--layout nhd"):
            oocattn.plan(dataset)
    else:
        Dataset.open(dataset)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["batch", None, "heads", "dim"], True),
        ([None, "token", "heads", "dim"], True),
        (["batch", "heads", None, "dim"], False),
        ([None, None, "heads", None], False),
    ],
)
def test_names_of_some_axes_are_believed_where_the_others_follow(
    tmp_path: Path, names: list[str | None], refused: bool
) -> None:
    dataset = write(tmp_path, dict.fromkeys("qkv", names))
    if refused:
        with pytest.raises(ProblemError, match=r"q is \[B, N, H, D\] \(.*unnamed.*--layout bnhd"):
            Dataset.open(dataset)
    else:
        Dataset.open(dataset)


@pytest.mark.parametrize("names", [7, "bnhd", [], ["batch"], [1, 2, 3, 4], [None] * 4, {"a": 1}, [["b"], "n", "h", "d"]])
def test_names_may_be_anything(tmp_path: Path, names: Any) -> None:
    Dataset.open(write(tmp_path, dict.fromkeys("qkv", names), zarr_format=2))


def test_verify_believes_the_names_as_well(tmp_path: Path) -> None:
    dataset, result = write(tmp_path / "dataset.zarr", {}), tmp_path / "result.zarr"
    oocattn.attention(dataset, result, kernel="cpu")
    for name in "qkv":
        zarr.open_array(dataset / name, mode="r+").attrs["_ARRAY_DIMENSIONS"] = ["batch", "token", "head", "dim"]
    with pytest.raises(ProblemError, match=r"q is \[B, N, H, D\]"):
        oocattn.verify(result)


def test_our_own_arrays_are_named(tmp_path: Path) -> None:
    synthesise(tmp_path / "dataset.zarr", tokens=20, heads=4, kv_heads=2, head_dim=8, dtype="float32")
    result = oocattn.attention(tmp_path / "dataset.zarr", tmp_path / "result.zarr", kernel="cpu")
    group = zarr.open_group(tmp_path / "dataset.zarr")
    found = {name: group[name].metadata.dimension_names for name in "qkv"}
    assert found["q"] == result.out.metadata.dimension_names == ("batch", "query_head", "token", "head_dim")
    assert found["k"] == found["v"] == ("batch", "kv_head", "token", "head_dim")
    assert result.lse.metadata.dimension_names == ("batch", "query_head", "token")


MANY_HEADS = r"\[1, 32, 4, 8\] is taken for \[B, H, N, D\], 32 heads x 4 tokens: .* if it is \[B, N, H, D\], .*--layout bnhd"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


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
    assert all(f"oocattn import --layout {other}`" in text for text in warned)
