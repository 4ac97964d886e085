"""A folder of datasets, of results finished and not, and of a stranger's files, which can be brought back as it was."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr
from interrupting import interrupted
from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn

DATASETS = ("plain.zarr", "v2.zarr", "sharded.zarr")
RESULTS = {"memory.zarr": "unfinished", "disk.zarr": "unfinished", "finished.zarr": "finished"}


ASKED = {
    "causal": True,
    "cu_seqlens_q": [0, 60, 60, 110, 170],
    "alibi_slopes": [0.5, 0.0, 0.25, 0.1],
    "learnable_sink": [0.0, 1.0, -2.0, 3.0],
}
"""What the results are of: their arrays lie in the result's group."""


@dataclass(frozen=True)
class Kept:
    """A file as it was, its content None for a folder; `mark` changes with each way of changing it."""

    content: bytes | None
    modified: int = 0
    mark: tuple[int, ...] = ()


@dataclass
class World:
    """Datasets, results and a stranger's files in one folder, and all of it as it was made."""

    folder: Path
    kept: dict[str, Kept] = field(default_factory=dict)
    right: dict[str, bytes] = field(default_factory=dict)

    @property
    def victim(self) -> Path:
        """Files of somebody else."""
        return self.folder / "victim"

    def restore(self, *touched: str) -> None:
        """Bring everything back; `touched` may differ without showing it."""
        for name in touched:
            remove(self.folder / name)
        for name, path in list(_tree(self.folder)):
            if name not in self.kept or not self._is_as_kept(name, path):
                remove(path)
        for name, kept in sorted(self.kept.items()):
            path = self.folder / name
            if kept.content is None:
                path.mkdir(exist_ok=True)
            elif not os.path.lexists(path):
                path.write_bytes(kept.content)
                os.utime(path, ns=(kept.modified, kept.modified))
                self.kept[name] = Kept(kept.content, kept.modified, _mark(path))

    def keep(self) -> None:
        """Remember everything as it is now."""
        for name, path in _tree(self.folder):
            status = os.lstat(path)
            content = None if stat.S_ISDIR(status.st_mode) else path.read_bytes()
            self.kept[name] = Kept(content, status.st_mtime_ns, _mark(path))

    def changed(self, damaged: set[str], own: tuple[str, ...]) -> list[str]:
        """What is not as it was kept, but for what was damaged and what a command may change."""
        found = dict(_tree(self.folder))
        names = found.keys() | self.kept.keys()
        spared = (*damaged, *own)
        foreign = [name for name in names if not any(name == each or name.startswith(f"{each}/") for each in spared)]
        return [
            name for name in foreign if name not in self.kept or name not in found or not self._is_as_kept(name, found[name])
        ]

    def _is_as_kept(self, name: str, path: Path) -> bool:
        kept = self.kept[name]
        return stat.S_ISDIR(os.lstat(path).st_mode) if kept.content is None else _mark(path) == kept.mark


def _mark(path: Path) -> tuple[int, ...]:
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), status.st_ino, status.st_size, status.st_mtime_ns


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            yield path.relative_to(folder).as_posix(), path


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_world(folder: Path) -> World:
    """Datasets of each kind, runs that were interrupted with partials in memory and on disk, and a finished result."""
    arrays = normal_arrays(170, heads=4, kv_heads=2)
    plain = write_dataset(folder / "plain.zarr", arrays, chunk_rows=64)
    sharded = {"shards": (1, 1, 128, 8), "chunk_rows": 32}
    write_dataset(folder / "sharded.zarr", arrays, **sharded)
    group = zarr.open_group(folder / "v2.zarr", mode="w", zarr_format=2)
    for name, data in zip("qkv", arrays, strict=True):
        group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=(1, 1, 64, 8))[...] = data
    world = World(folder)
    world.victim.mkdir()
    (world.victim / "thesis.txt").write_text("precious")
    (world.victim / "data.json").write_text("{}")
    asked = {"chunks": 7, "decomposition": "cqs", **ASKED}
    plan = plan_for(plain, **asked)
    finished = carry_out(plan, plain, folder / "finished.zarr").path
    oocattn.verify(finished)
    for partials in ("memory", "disk"):
        interrupted(plan_for(plain, partials=partials, **asked), plain, folder / f"{partials}.zarr")
    world.right = result_bits(finished)
    world.keep()
    return world


def result_bits(result: Path) -> dict[str, bytes]:
    """The bits of `out` and `lse`, as Zarr reads them."""
    return {name: np.asarray(zarr.open_array(result / name, mode="r")[...]).tobytes() for name in ("out", "lse")}
