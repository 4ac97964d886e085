"""A repeated dataset is what it says: the attention to its keys is that to the short one's, each as often."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

import oocattn
from oocattn.storage.make.synth import synthesise

SCRIPT = Path(__file__).parents[1] / "examples" / "repeat_dataset.py"


def repeat(short, long, times):
    command = [sys.executable, str(SCRIPT), str(short), str(long), "--times", str(times)]
    return subprocess.run(command, capture_output=True, text=True)


def test_repeated_keys_weigh_as_often(tmp_path):
    short, long = tmp_path / "short.zarr", tmp_path / "long.zarr"
    synthesise(short, tokens=96, heads=4, kv_heads=2, head_dim=16, dtype="bfloat16")
    assert repeat(short, long, 3).returncode == 0
    once = oocattn.attention(short, tmp_path / "once.zarr", dtype="float32")
    thrice = oocattn.attention(long, tmp_path / "thrice.zarr", dtype="float32")
    out, lse = (np.tile(array[...], 3) for array in (np.moveaxis(once.out[...], 2, -1), once.lse[...]))
    np.testing.assert_allclose(np.moveaxis(thrice.out[...], 2, -1), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(thrice.lse[...], lse + math.log(3), rtol=1e-6)
    assert (long / "k" / "c.0.1.2.0").samefile(short / "k" / "c.0.1.0.0")


def test_a_part_of_a_chunk_is_not_repeated(tmp_path):
    short = tmp_path / "short.zarr"
    synthesise(short, tokens=96, heads=1, head_dim=16, dtype="float32")
    metadata = json.loads((short / "q" / "zarr.json").read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"][2] = 64
    (short / "q" / "zarr.json").write_text(json.dumps(metadata))
    found = repeat(short, tmp_path / "long.zarr", 2)
    assert found.returncode == 1
    assert "96 tokens are no whole number of chunks of 64" in found.stderr
