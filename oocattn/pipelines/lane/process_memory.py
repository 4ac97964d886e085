"""Memory that lanes of this process hold, as the operating system and PyTorch count it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from oocattn.pipelines.watch.events import Memory, name_process

_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


class MemoryMeter:
    """What the process of a lane holds beyond what it had when this was made, and what PyTorch has reserved on its GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process = name_process()
        self._before = _anonymous_bytes()

    def read(self) -> Memory:
        """The memory that is held now."""
        reserved = torch.cuda.memory_reserved(self._device) if self._device.startswith("cuda") else 0
        return Memory(self._process, max(0, _anonymous_bytes() - self._before), reserved)


def _anonymous_bytes() -> int:
    """Anonymous memory of this process, pinned memory included; 0 where that is unknown."""
    with suppress(OSError):
        found = _ANONYMOUS.search(Path("/proc/self/status").read_text(errors="replace"))
        return int(found[1]) * 1024 if found else 0
    return 0
