"""Which earlier tokens the heads of a small language model look at: a survey of its attention over a real text, drawn.

The text and the model are those of real_text.py, beside this file, which needs the same packages; drawing needs one more:

    pip install 'oocattn[draw]'
    python examples/where_heads_look.py heads-data

It writes FOLDER/heads.png, a map for each head, and prints a line for each: how many keys its rows attend, in effect
(exp of the entropy, the median), how much weight goes to the token itself and to the one before, and the words that
receive most.
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from real_text import model_folder, token_blocks, write_real_text
from tokenizers import Tokenizer

import oocattn


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compute causal attention over a real text, survey its weights, draw them, say where each head looks."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the dataset, the result and the picture")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the text (default: %(default)s)")
    options = parser.parse_args()
    dataset, result = options.folder / "text.zarr", options.folder / "out.zarr"
    write_real_text(dataset, options.tokens, overwrite=True)
    oocattn.attention(dataset, result, causal=True, overwrite=True)
    survey = oocattn.survey(result, overwrite=True)
    words = words_of(options.tokens)
    print("head  keys  itself  before  words that receive most")
    for head in range(survey.arrays["entropy"].shape[1]):
        print(describe(survey, head, words))
    print(f"drawn in {survey.visualize(options.folder / 'heads.png')}")


def words_of(tokens: int) -> list[str]:
    """The text, token by token."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    ids = chain.from_iterable(block.tolist() for block in token_blocks(tokens))
    return [tokenizer.id_to_token(number) for number in ids]


def describe(survey: oocattn.Survey, head: int, words: list[str]) -> str:
    """What a head looks at, in a line."""
    arrays = {name: np.asarray(array[0, head]) for name, array in survey.arrays.items() if name != "pooled"}
    keys = np.median(np.exp(arrays["entropy"]))
    itself, before = (weight_at(arrays["top_keys"], arrays["top_weights"], distance) for distance in (0, 1))
    rows = np.arange(len(words), 0, -1)  # that attend each key
    received: dict[str, list[float]] = {}
    for word, weight in zip(words, arrays["received"] / rows * (len(words) / 2), strict=True):
        received.setdefault(word, []).append(float(weight))
    often = {word: np.mean(weights) for word, weights in received.items() if len(weights) >= 10}
    most = sorted(often, key=lambda word: -often[word])[:5]
    return f"{head:4d} {keys:5.0f} {itself:7.3f} {before:7.3f}  {' '.join(most)}"


def weight_at(keys: NDArray[np.int64], weights: NDArray[np.float32], distance: int) -> float:
    """The weight of the key that is so many tokens before its row, among the top keys, in the mean."""
    rows = np.arange(len(keys))[:, np.newaxis]
    return float(np.where(keys == rows - distance, weights, 0).sum(axis=1).mean())


if __name__ == "__main__":
    main()
