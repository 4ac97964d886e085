"""Objects that stay in the memory of this process: what is pickled of them is a token, by which they are found again."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Any
from weakref import WeakValueDictionary

from oocattn.errors import ProblemError
from oocattn.naming import named

_live: WeakValueDictionary[str, Any] = WeakValueDictionary()


def keep(found: Any) -> str:
    """The token of an object. It is found by it while somebody else holds it."""
    token = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    _live[token] = found
    return token


class ElsewhereError(ProblemError):
    """An object lies in the memory of another process. The message says what to do."""


class Elsewhere:
    """What stands for an object in another process than its own: any use raises ElsewhereError, which calls it `label`."""

    def __init__(self, token: str, label: str) -> None:
        host, pid, _ = token.rsplit(":", 2)
        self._why = (
            f"{label} is an object of process {pid} on {host}, and this is process {os.getpid()}: save it where all workers "
            f"can read it (numpy.save; of an array of Dask, .to_zarr) and give the path, or leave {named('client')} out"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copies and compares looks for
            raise AttributeError(name)
        raise ElsewhereError(self._why)


def recall(token: str, label: str) -> Any:
    """The object of a token, which messages call `label`, or what stands for it here."""
    found = find(token)
    return Elsewhere(token, label) if found is None else found


def find(token: str) -> Any:
    """The object of a token, or None in another process than its own."""
    return _live.get(token)
