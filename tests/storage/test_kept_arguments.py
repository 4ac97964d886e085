"""Arguments that are arrays, kept beside a result: read again to the bit, by NumPy alone, and never believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import sizes_of

from oocattn.errors import IntegrityError
from oocattn.problem.given import GivenArrays
from oocattn.storage.files import folders
from oocattn.storage.results.arguments import read_given, write_given

GIVEN = GivenArrays(
    cu_seqlens_q=np.array([0, 3, 3, 20]),
    cu_seqlens_k=np.array([0, 2**40, 2**40 + 1, 2**41]),
    alibi_slopes=np.array([[0.5, -0.25], [1e-40, 3.4e38]], np.float32),
    learnable_sink=np.array([-1.5, 0.0], np.float32),
)


@pytest.fixture
def group(fast_path: Path) -> Path:
    write_given(zarr.open_group(fast_path / "result.zarr", mode="w", zarr_format=3), GIVEN)
    return fast_path / "result.zarr"


def assert_same(found: GivenArrays, expected: GivenArrays = GIVEN) -> None:
    names = [name for name, _ in expected.items()]
    assert [name for name, _ in found.items()] == names
    for name in names:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
        assert not ours.flags.writeable


def test_kept_arrays_are_read_to_the_bit(group: Path) -> None:
    assert_same(read_given(group, GIVEN.digests))


def test_plain_zarr_reads_them_and_each_dimension_has_one_length(group: Path) -> None:
    for name, array in GIVEN.items():
        np.testing.assert_array_equal(zarr.open_group(group, mode="r")[name][...], array)
    assert sizes_of(group) == {"boundary": 4, "batch": 2, "query_head": 2}


def test_only_what_the_problem_names_is_read(group: Path) -> None:
    (group / "alibi_slopes/zarr.json").write_text("no JSON")
    digests = {"learnable_sink": GIVEN.digests["learnable_sink"]}
    assert_same(read_given(group, digests), GivenArrays(learnable_sink=GIVEN.learnable_sink))
    assert_same(read_given(group, {}), GivenArrays())


def test_reading_takes_neither_zarr_nor_torch(group: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; from oocattn.storage.results.arguments import read_given;"
        "read_given(Path(sys.argv[1]), json.loads(sys.argv[2])); assert not {'zarr', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, group, json.dumps(dict(GIVEN.digests))], check=True)


def test_a_copy_in_other_chunks_or_compressed_is_read_too(group: Path) -> None:
    copy = zarr.open_group(group.with_name("copy.zarr"), mode="w", zarr_format=3)
    for name, array in GIVEN.items():
        copy.create_array(name, data=array, chunks=(1,) * array.ndim, config={"write_empty_chunks": True})
    assert_same(read_given(group.with_name("copy.zarr"), GIVEN.digests))


def test_their_files_are_ours_to_remove(group: Path) -> None:
    assert folders.find_foreign(group, folders.GROUP) is None


def changed(name: str, **fields: Any) -> Callable[[Path], Any]:
    """A change of an array's metadata."""

    def change(group: Path) -> None:
        path = group / name / "zarr.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def replaced(path: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def change(group: Path) -> None:
        (group / path).unlink()
        make(group / path)

    return change


CHUNK = "cu_seqlens_q/c.0"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no array": (lambda group: shutil.rmtree(group / "cu_seqlens_q"), "has no array 'cu_seqlens_q', which its run"),
    "no metadata": (lambda group: (group / "cu_seqlens_q/zarr.json").unlink(), "has no array 'cu_seqlens_q'"),
    "no chunk": (lambda group: (group / CHUNK).unlink(), "c.0 is missing: copy"),
    "other numbers": (replaced(CHUNK, lambda path: path.write_bytes(bytes(32))), "is not what the run was given"),
    "short": (replaced(CHUNK, lambda path: path.write_bytes(bytes(24))), "has 24 bytes, expected 32"),
    "long": (replaced(CHUNK, lambda path: path.write_bytes(bytes(33))), "has more than 32 bytes"),
    "FIFO": (replaced(CHUNK, os.mkfifo), "is no regular file"),
    "folder": (replaced(CHUNK, os.mkdir), "is no regular file"),
    "link": (replaced(CHUNK, lambda path: path.symlink_to("../learnable_sink/c.0")), "is a symbolic link"),
    "device": (replaced(CHUNK, lambda path: path.symlink_to("/dev/zero")), "is a symbolic link"),
    "FIFO as metadata": (replaced("cu_seqlens_q/zarr.json", os.mkfifo), "is no regular file"),
    "no JSON": (lambda group: (group / "cu_seqlens_q/zarr.json").write_text("{"), "is damaged"),
    "group": (changed("cu_seqlens_q", node_type="group"), "has no array 'cu_seqlens_q'"),
    "huge": (changed("cu_seqlens_q", shape=[2**50]), r"is 'int64' \[1125899906842624\]: it is damaged"),
    "negative": (changed("cu_seqlens_q", shape=[-4]), r"is 'int64' \[-4\]: it is damaged"),
    "no shape": (changed("cu_seqlens_q", shape={}), "is 'int64' {}: it is damaged"),
    "floats as sizes": (changed("cu_seqlens_q", shape=[4.0]), r"is 'int64' \[4.0\]: it is damaged"),
    "another rank": (changed("cu_seqlens_q", shape=[2, 2]), "missing|is damaged"),
    "another dtype": (changed("cu_seqlens_q", data_type="float64"), "is 'float64'"),
    "dtype as a list": (changed("cu_seqlens_q", data_type=[]), r"is \[\] \[4\]: it is damaged"),
    "codecs": (changed("cu_seqlens_q", codecs=[{"name": "gzip"}]), "codec|cannot be opened|damaged"),
    "big-endian": (
        changed("cu_seqlens_q", codecs=[{"name": "bytes", "configuration": {"endian": "big"}}]),
        "is not what the run was given",
    ),
    "other chunks": (
        changed("cu_seqlens_q", chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2]}}),
        r"'c.0' .* has more than 16 bytes|'c.1' .* is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_or_planted_arrays_are_refused(group: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    damage(group)
    with pytest.raises(IntegrityError, match=words):
        read_given(group, GIVEN.digests)


@pytest.mark.parametrize("name", ["../out", "q", "", "causal"])
def test_a_name_of_no_argument_is_refused(group: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match=r"its problem has the array .*: expected some of cu_seqlens_q"):
        read_given(group, {name: "0" * 32})
