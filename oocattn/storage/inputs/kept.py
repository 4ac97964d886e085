"""Objects that stay in the memory of this process: what is pickled of them is a token, by which they are found again."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Any
from weakref import WeakValueDictionary

from oocattn.errors import ProblemError

_live: WeakValueDictionary[str, Any] = WeakValueDictionary()


def keep(found: Any) -> str:
    """The token of an object. It is found by it while somebody else holds it."""
    token = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    _live[token] = found
    return token


class Elsewhere:
    """What stands for an object in another process than its own: any use raises ProblemError, which calls it `label`."""

    def __init__(self, token: str, label: str) -> None:
        host, pid, _ = token.rsplit(":", 2)
        self._why = (
            f"{label} lies in the memory of process {pid} on {host}, and this is process {os.getpid()}: workers of a "
            "cluster read files and stores; write it to one, or run without client="
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copies and compares looks for
            raise AttributeError(name)
        raise ProblemError(self._why)


def recall(token: str, label: str) -> Any:
    """The object of a token, which messages call `label`, or what stands for it here."""
    found = _live.get(token)
    return Elsewhere(token, label) if found is None else found
