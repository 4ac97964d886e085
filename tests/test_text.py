"""Commands that are printed name the same files once they are pasted into a shell, whatever the names."""

from __future__ import annotations

import os
import subprocess

import pytest

from oocattn.text import printable, shell_command

NAMES = [
    "plain",
    "two words",
    "it's",
    "$(touch x)",
    "a\nb",
    "\x1b[31mred",
    "back\\n\x07slash'",
    "\u202eé",
    "\udcff.zarr",
    "7\x018",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_command_that_is_printed_names_the_same_file_in_a_shell(name: str) -> None:
    shown = shell_command(["printf", "%s", name])
    assert printable(shown) == shown
    assert subprocess.run(["bash", "-c", shown], stdout=subprocess.PIPE, check=True).stdout == os.fsencode(name)


def test_a_name_that_no_file_can_have_is_no_error() -> None:
    assert shell_command(["\ud800"]) == r"$'\xed\xa0\x80'"
