"""A long dataset that needs the space of a short one: for trying jobs of a billion tokens on a small disk.

    oocattn synth short.zarr --tokens 128M --heads 1 --head-dim 16 --dtype bfloat16
    python examples/repeat_dataset.py short.zarr long.zarr --times 8

The short one is as `oocattn synth` writes it: a file a chunk, the last one whole. Its tokens are repeated: the files of the
long one are hard links to its own. All is read as if it were new, but from the page cache where the short one fits there.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path


def repeat(short: Path, long: Path, times: int) -> None:
    """Make the dataset `long` of the arrays of `short`, with their tokens `times` over."""
    long.mkdir()
    group = json.loads((short / "zarr.json").read_text())
    (long / "zarr.json").write_text(json.dumps({**group, "attributes": {}}))  # they say how the short one is made again
    for array in sorted(folder for folder in short.iterdir() if folder.is_dir()):
        metadata = json.loads((array / "zarr.json").read_text())
        tokens, chunk = metadata["shape"][2], metadata["chunk_grid"]["configuration"]["chunk_shape"][2]
        if tokens % chunk:
            raise SystemExit(f"{array}: {tokens} tokens are no whole number of chunks of {chunk}")
        metadata["shape"][2] = times * tokens
        (long / array.name).mkdir()
        (long / array.name / "zarr.json").write_text(json.dumps(metadata))
        for file in array.glob("c.*"):
            c, batch, head, at, column = file.name.split(".")
            for again in range(int(at), times * tokens // chunk, tokens // chunk):
                os.link(file, long / array.name / f"{c}.{batch}.{head}.{again}.{column}")


def main() -> None:
    """Repeat the dataset that the command line names."""
    parser = argparse.ArgumentParser(description="A long dataset of hard links to the chunks of a short one.")
    parser.add_argument("short", type=Path, help="the dataset that is there")
    parser.add_argument("long", type=Path, help="the dataset to make, on the same file system")
    parser.add_argument("--times", type=int, default=8, help="how often the tokens are repeated (default: 8)")
    asked = parser.parse_args()
    repeat(asked.short, asked.long, asked.times)


if __name__ == "__main__":
    main()
