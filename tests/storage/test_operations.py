"""An operation that fails says what was done, to which path, why not, and what to do."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from oocattn.cli import main as cli
from oocattn.naming import on_command_line
from oocattn.storage.files.operations import describe_error, is_disk_full, name_failure, words_of


def failing(number: int, *places: str) -> OSError:
    return OSError(number, os.strerror(number), *places)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "read-only: choose another path"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ELOOP, "symbolic links"),
        (errno.ESTALE, "mount it again"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "the disk or its connection failed"),
        (errno.ETXTBSY, "a program runs from it"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOTCONN, "mount it again"),
    ],
)
def test_an_error_keeps_its_class_and_gets_the_words_it_lacks(number: int, remedy: str) -> None:
    with pytest.raises(OSError, match="cannot write /a/b: ") as failure, name_failure("write", Path("/a/b")):
        raise failing(number)
    assert failure.value.errno == number
    assert type(failure.value) is type(failing(number))
    words = words_of(pickle.loads(pickle.dumps(failure.value)))  # as from a worker
    assert words.startswith(f"cannot write /a/b: {os.strerror(number)}; ")
    assert remedy in words
    assert describe_error(failure.value) == words


def test_the_innermost_operation_is_named() -> None:
    with pytest.raises(FileNotFoundError) as failure, name_failure("write", "/a"), name_failure("open", "/b"):
        raise failing(errno.ENOENT, "c")
    assert words_of(failure.value) == "cannot open /b: No such file or directory"


def test_a_path_cannot_forge_a_line() -> None:
    with pytest.raises(OSError, match="cannot") as failure, name_failure("open", "/a\nfinished"):
        raise failing(errno.EIO)
    assert words_of(failure.value).startswith("cannot open /a\\nfinished: Input/output error")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (failing(errno.EACCES, "/a"), "/a: Permission denied; check the permissions of it and of the folders above it"),
        (OSError(errno.EXDEV, "no", "/a", None, "/b"), "/a and /b: no"),
        (OSError("words of somebody's own"), "words of somebody's own"),
        (OSError(errno.EIO, "the disk is on fire"), "[Errno 5] the disk is on fire"),
        (OSError(), "OSError"),
        (ValueError("wrong"), "wrong"),
        (MemoryError(), "out of memory (no more is given): lower host_memory, or close other programs, or raise the"),
    ],
)
def test_other_errors_say_what_they_know(error: Exception, words: str) -> None:
    assert words_of(error).startswith(words)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_told_from_other_failures(number: int) -> None:
    assert is_disk_full(failing(number))
    assert not is_disk_full(failing(errno.EIO))


@pytest.mark.parametrize("error", [failing(errno.EINVAL, "/a/b"), MemoryError("64 GiB")])
def test_a_command_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("oocattn.status", fail)
    assert cli.main(["status", "/a/b"]) == 1
    with on_command_line():
        assert capsys.readouterr().err == f"oocattn: {words_of(error)}\n"
