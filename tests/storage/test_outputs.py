"""Files that a user names as outputs: only those that oocattn wrote are replaced, and at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from oocattn import ProblemError, ResultExistsError
from oocattn.storage.files.outputs import JSON_MARK, SVG_MARK, check_output, write_output

OURS = {"trace": f'{JSON_MARK}"traceEvents": []}}', "picture": f'<svg width="1">{SVG_MARK}</svg>'}
FOREIGN = {
    "empty": "",
    "text": "mine",
    "another trace": '{"traceEvents": [], "otherData": {"producer": "oocattn"}}',
    "another picture": '<svg width="1"></svg>',
    "a page about a picture": f"<p>{SVG_MARK}",
    "a mark far below": f"<svg {' ' * 1000}{SVG_MARK}",
}


@pytest.mark.parametrize("text", [None, *OURS.values()])
def test_an_output_of_oocattn_is_replaced(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "output"
    if text is not None:
        path.write_text(text)
    write_output(path, lambda file: file.write("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_file_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "output"
    path.write_text(text)
    with pytest.raises(ResultExistsError, match=f"{path} exists and was not written by oocattn"):
        write_output(path, lambda file: file.write("new"))
    assert path.read_text() == text


def link_to_ours(path: Path) -> None:
    path.with_name("ours").write_text(OURS["trace"])
    path.symlink_to("ours")


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, link_to_ours, lambda path: path.symlink_to("nowhere")], ids=["FIFO", "folder", "link", "-"]
)
def test_an_output_path_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "output")
    with pytest.raises(ResultExistsError, match="output exists"):
        check_output(tmp_path / "output")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"nowhere.*folder does not exist"):
        check_output(tmp_path / "nowhere" / "output")


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text(OURS["trace"])

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_output(path, fail)
    assert path.read_text() == OURS["trace"]
    assert list(tmp_path.iterdir()) == [path]
