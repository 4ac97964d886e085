"""Kills a process at a step of a run towards the disk, which is how the tests make runs and workers die."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refusing import place_of

from oocattn.operations import forward
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.watch.events import Attended
from oocattn.storage.files import renaming

STEPS = ("pwrite", "fsync", "replace", "rename", "unlink")
"""Functions of `os` that bring a run's files about; each call is a moment."""

REQUESTS = ("put_object", "delete_object", "delete_objects", "upload_part", "complete_multipart_upload")
"""Requests that change an S3 store."""


class Fuse:
    """Counts the moments of this process, and kills it at the last of them, if that is given.

    A moment is a write within `folder`, which is then only half made, a sync, a rename or a removal there, a merge, a
    division, the end of a subproblem, or a request that changes a store: before it is sent, and when it is answered. What
    is done is logged in the file `log`, a line each: `begin` and `end` of a subproblem, and `kill`, with the seconds since
    the epoch.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = str(folder)
        self.last: int | None = None
        self.moments = 0
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for name in STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        renaming._rename_no_replace = self._counted("rename", renaming._rename_no_replace)
        for name in ("merge", "finalise"):
            setattr(forward, name, self._moment(getattr(forward, name)))
        if "s3fs" in sys.modules:
            files = sys.modules["s3fs"].S3FileSystem
            files._call_s3 = self._requested(files._call_s3)
        real = CpuDevice.launch

        def launch(device: CpuDevice, staged: StagedChunks, *rest: Any) -> Callable[[], Attended]:
            place = f"{staged.head_group} {staged.index}"
            self.write(f"begin {place}")
            finish = real(device, staged, *rest)
            self.write(f"end {place}")
            self.burn()
            self.kill_at_the_end()
            return finish

        CpuDevice.launch = launch  # type: ignore[method-assign]

    def _moment(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.burn()
            self.kill_at_the_end()
            return real(*arguments)

        return call

    def _requested(self, real: Callable[..., Any]) -> Callable[..., Any]:
        async def call(files: Any, method: str, *arguments: Any, **options: Any) -> Any:
            changes = method in REQUESTS
            if changes:
                self.burn()
                self.kill_at_the_end()
            answer = await real(files, method, *arguments, **options)
            if changes:
                self.burn()
                self.kill_at_the_end()
            return answer

        return call

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            path = place_of((target, *arguments), options)
            if path.startswith(self.folder) and self.burn() and name == "pwrite":
                content, offset = arguments
                real(target, content[: len(content) // 2], offset)
            self.kill_at_the_end()
            return real(target, *arguments, **options)

        return call

    def write(self, what: str) -> None:
        os.write(self._log, f"{what} {time.time()}\n".encode())

    def burn(self) -> bool:
        """Count a moment; whether it is the last."""
        self.moments += 1
        return self.moments == self.last

    def kill_at_the_end(self) -> None:
        if self.last is not None and self.moments >= self.last:
            self.write("kill")
            os.kill(os.getpid(), signal.SIGKILL)


_fuses: dict[str, Fuse] = {}


def arm(folder: Path, log: Path, last: int | None) -> None:
    """Count this process's moments within `folder` from now on, to the last."""
    fuse = _fuses.setdefault(str(folder), None) or Fuse(folder, log)  # type: ignore[arg-type]
    _fuses[str(folder)] = fuse
    fuse.moments, fuse.last = 0, last


def moments(folder: Path) -> int:
    """How many this process has had since it was armed; 0 where it was not."""
    return _fuses[str(folder)].moments if str(folder) in _fuses else 0
