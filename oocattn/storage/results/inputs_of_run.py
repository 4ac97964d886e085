"""Whether the inputs that are named for a result are those that its run read."""

from __future__ import annotations

from oocattn.errors import IntegrityError
from oocattn.naming import named
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import NAMES, in_words
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.values import checksum_like, sample
from oocattn.storage.results.summary import DatasetRecord


def fingerprint_like(dataset: Dataset, recorded: DatasetRecord, result: str) -> str:
    """The fingerprint of a dataset, to be compared with the recorded one: equal where it is known to be the same.

    A tensor that the run read from memory is known by the checksum of all of its numbers, wherever it lies now. Another one
    whose fingerprint is not the recorded one may be a copy: a sample of its numbers is compared. Raises IntegrityError where
    numbers are known to differ.
    """
    before = dict(zip(NAMES, recorded.fingerprint.split("-"), strict=False))
    sampled = dict(zip(NAMES, recorded.samples.split("-"), strict=False))
    found, differing = {}, []
    for name, source in dataset.arrays.items():
        fingerprint, numbers, origin = before.get(name, ""), sampled.get(name, ""), recorded.tensors.get(name)
        if origin is not None and origin.in_memory:
            numbers = f"={fingerprint}"
        found[name] = fingerprint if _has_all(source, numbers) else source.fingerprints()[0]
        if found[name] != fingerprint and numbers and (numbers[0] == "=" or sample(source) != numbers):
            differing.append(name)
    if differing:
        raise IntegrityError(
            f"{dataset.location} is not what the run to {result} read: numbers of {in_words(differing)} "
            f"differ; name the inputs of that run with {named('inputs')}, or compute a result of these"
        )
    return "-".join(found.values())


def _has_all(source: TensorSource, numbers: str) -> bool:
    """Whether its numbers are all those of a recorded checksum, "=" before it; False where a sample is recorded."""
    return numbers.startswith("=") and checksum_like(source, numbers[1:]) == numbers[1:]
