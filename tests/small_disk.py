"""Runs on a file system that is too small, in a mount namespace of its own: see `test_disk_full`.

unshare --user --map-root-user --mount python tests/small_disk.py FOLDER PARTIALS:KIBIBYTES ...
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from support import assert_same_bits, carry_out, normal_arrays, plan_for, replanned, write_dataset

import oocattn
from oocattn.storage.paths import ResultPaths


def mount(disk: Path, kibibytes: int, *options: str) -> None:
    size = ",".join([*options, f"size={kibibytes}k"])
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)


def main(folder: Path, cases: list[tuple[str, int]]) -> None:
    """A run on a disk of so many KiB fails, and is resumed once there is room."""
    folder.mkdir(exist_ok=True)
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    dataset = write_dataset(folder / "dataset.zarr", normal_arrays(300, heads=4, kv_heads=2, head_dim=32))
    right = carry_out(plan_for(dataset, chunks=13, causal=True), dataset, folder / "right.zarr")
    for partials, kibibytes in cases:
        plan = plan_for(dataset, chunks=13, causal=True, partials=partials)
        plan = replanned(plan, checkpoint_seconds=0.01)
        disk = folder / f"{partials}-{kibibytes}"
        disk.mkdir()
        mount(disk, kibibytes)
        result = disk / "result.zarr"
        try:
            carry_out(plan, dataset, result)
        except OSError as error:
            print(f"failed: {error}")
        state = ResultPaths.at(result).state
        print(f"left half written: {len(list(state.rglob('*.partial')))}")
        print(oocattn.status(result))
        mount(disk, 64 * kibibytes, "remount")
        assert_same_bits(oocattn.resume(result, engine="inline"), right)
        print(f"beside it: {sorted(path.name for path in state.iterdir())}")
        print("bit-identical\n=")


if __name__ == "__main__":
    pairs = (case.split(":") for case in sys.argv[2:])
    main(Path(sys.argv[1]), [(partials, int(kibibytes)) for partials, kibibytes in pairs])
