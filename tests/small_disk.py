"""Runs on a file system that is too small, in a mount namespace of its own: see `test_disk_full`.

unshare --user --map-root-user --mount python tests/small_disk.py FOLDER PARTIALS KIBIBYTES
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import assert_same_bits, carry_out, normal_arrays, plan_for, replanned, write_dataset

import oocattn
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.storage.paths import ResultPaths


def mount(disk: Path, kibibytes: int, *options: str) -> None:
    size = ",".join([*options, f"size={kibibytes}k"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)


def main(folder: Path, partials: str, kibibytes: int) -> None:
    """A run on a disk of so many KiB fails, and is resumed once there is room."""
    disk = folder / "disk"
    disk.mkdir()
    mount(disk, kibibytes)
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(400, heads=4, kv_heads=2, head_dim=32))
    plan = replanned(plan_for(dataset, chunks=31, causal=True, partials=partials), checkpoint_seconds=0.01)
    with local_client() as client:
        right = carry_out(plan, dataset, folder / "right.zarr", client)
        result = disk / "result.zarr"
        try:
            carry_out(plan, dataset, result, client)
        except OSError as error:
            print(f"failed: {error}")
        state = ResultPaths.at(result).state
        print(f"left half written: {len(list(state.rglob('*.partial')))}")
        print(oocattn.status(result))
        mount(disk, 64 * kibibytes, "remount")
        assert_same_bits(oocattn.resume(result, client=client), right)
        print(f"beside it: {[path.name for path in state.iterdir()]}")
        print("bit-identical")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
