"""How messages name arguments: `window_size` to a caller of Python, `--window-size` to a user of the command.

Whatever names an argument in a message gets the name here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_faces = ["Python"]
"""The faces that are in use, the last one now. Workers on a user's own cluster always have Python's."""

_COMMAND_NAMES = {
    "client": "scheduler",
    "dashboard_address": "dashboard",
    "inputs": "dataset, or --q --k --v",
    "map": "draw",
    "storage_options": "storage-option",
}
"""Arguments that have another name on the command line."""

_JOINTS = {"queries": ":", "window_size": " "}
"""What is between the items of an argument on the command line; of others it is a comma."""


@contextmanager
def on_command_line() -> Iterator[None]:
    """Have messages name options of the command while it runs."""
    _faces.append("command")
    try:
        yield
    finally:
        _faces.pop()


def is_command() -> bool:
    """Whether messages are for a user of the command, not for a caller of Python."""
    return _faces[-1] == "command"


def by_face(python: str, command: str) -> str:
    """What a caller of Python reads, or a user of the command."""
    return command if is_command() else python


def named(argument: str) -> str:
    """The name of an argument: `host_memory`, or `--host-memory`."""
    if _faces[-1] == "Python":
        return argument
    return "--" + _COMMAND_NAMES.get(argument, argument).replace("_", "-")


def setting(argument: str, value: object) -> str:
    """An argument with a value, as one writes it: `overwrite=True`, or `--overwrite`."""
    if _faces[-1] == "Python":
        return f"{argument}={value!r}"
    if isinstance(value, bool):
        return named(argument if value else f"no_{argument}")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = ("none" if item is None else str(item) for item in value)
        return f"{named(argument)} {_JOINTS.get(argument, ',').join(items)}"
    return f"{named(argument)} {shlex.quote(str(value))}"


def settings(values: Mapping[str, object]) -> str:
    """Several arguments with their values, as one writes them one after another."""
    return (", " if _faces[-1] == "Python" else " ").join(setting(name, value) for name, value in values.items())


def as_given(argument: str, value: object, shown: str = "") -> str:
    """An argument with the value that was given, right or wrong, cut short if long: `prefix = 3`, or `--prefix 3`."""
    if _faces[-1] == "Python":
        return f"{argument} = {shown or repr(value):.80}"
    return f"{setting(argument, value):.120}"
