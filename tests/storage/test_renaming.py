"""A new name is taken from nothing, whatever the file system can."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from oocattn.storage.files import renaming
from oocattn.storage.files.renaming import rename_new


@pytest.fixture(params=["renameat2", "links", "neither"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file system has."""
    if request.param != "renameat2":
        monkeypatch.setattr(renaming, "_rename_no_replace", refuse_with(errno.EINVAL))
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refuse_with(errno.EPERM))


def refuse_with(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def make_file(path: Path) -> None:
    path.write_text(path.name)


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text(path.name)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_name_is_given(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "source")
    rename_new(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    content = tmp_path / "target" if make is make_file else tmp_path / "target" / "inside"
    assert content.read_text() == "source"


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize(
    "there",
    [make_file, make_folder, Path.mkdir, lambda path: path.symlink_to("nowhere")],
    ids=["file", "folder", "empty", "link"],
)
@pytest.mark.parametrize("looked", [True, False], ids=["", "appeared meanwhile"])
def test_a_rename_never_replaces_what_has_the_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    there: Callable[[Path], None],
    looked: bool,
) -> None:
    make(tmp_path / "source")
    there(tmp_path / "target")
    if not looked and (there is Path.mkdir or renaming._rename_no_replace.__name__ != "refuse"):
        pytest.skip("an empty folder may be replaced, and renameat2 does not look first")
    if not looked:
        monkeypatch.setattr(renaming, "is_taken", lambda path: False)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"cannot rename .*source to .*target: File exists"):
        rename_new(tmp_path / "source", tmp_path / "target")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if there is make_file:
        assert (tmp_path / "target").read_text() == "target"
