"""The identity of a dataset, from sizes, times and samples of its arrays."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from oocattn.problem.arrays import KEY_BIAS
from oocattn.problem.second_pass import LSE
from oocattn.storage.chunk_errors import damaged_chunk, missing_chunk, refuse_missing
from oocattn.storage.files.operations import name_failure
from oocattn.storage.files.regular import advise, open_regular, read_exactly
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.given_store import ASKED, GivenStore
from oocattn.storage.layout import chunk_key, coordinates_of, stored_chunks, stored_counts
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.remote.store import all_of
from oocattn.storage.zarr_compat import ByteRequest, RangeByteRequest, SuffixByteRequest, buffer_prototype, sync
from oocattn.threads import ThreadPool

NAMES = ("q", "k", "v", KEY_BIAS, LSE)
"""The arrays of a dataset, in the order of their fingerprints. Only the first three are always there."""

SAMPLED_CHUNKS, SAMPLED_BYTES = 5, 1 << 16
"""Stored chunks of an array whose content is part of the fingerprint, and how much at each end of them."""

# What of an array's metadata says how its bytes are to be read, in Zarr v3 and v2.
_IDENTITY = (
    *("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs"),
    *("dtype", "chunks", "dimension_separator", "compressor", "filters", "order"),
)


@dataclass(frozen=True)
class Fingerprints:
    """Digests that tell a dataset from another, or from itself once changed.

    Each is one of each array, joined by "-". All cover shape, dtype, chunk grid and codecs, both ends of a few stored chunks
    and, in a local folder, the size of every chunk file. `recorded` covers modification times, too, or what
    a store tells of contents: results keep it, and a copy shares it if times were copied. `within_run` also covers change
    times, which no copy shares (inodes may change).
    """

    recorded: str
    within_run: str
    untimed: str


def changed_arrays(before: str, after: str) -> str:
    """Name the arrays that differ between fingerprints: "k", "q, k and v", or ""."""
    pairs = itertools.zip_longest(NAMES, before.split("-"), after.split("-"), fillvalue="")
    return in_words([name for name, old, new in pairs if old != new])


def in_words(names: Sequence[str]) -> str:
    """Names of arrays as a sentence has them: "q, k and v", or ""."""
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last


def fingerprints_of(name: str, array: zarr.Array[Any], location: str, axes: Axes) -> tuple[str, str, str]:
    """Half a SHA-256 for each of `Fingerprints`, in their order, in one walk."""
    beginning = json.dumps([name, identity(array), *unusual(axes, array.ndim)], sort_keys=True, default=str).encode()
    recorded, within_run, untimed = digests = tuple(hashlib.sha256(beginning) for _ in range(3))
    for _, key, status in chunk_files(array, location):
        state = (status.st_size, status.st_mtime_ns)
        recorded.update(f"\n{key} {state}".encode())
        within_run.update(f"\n{key} {(*state, status.st_ctime_ns)}".encode())
        untimed.update(f"\n{key} {status.st_size}".encode())
    versions, contents = _ask(array, location)
    for version in versions:
        recorded.update(f"\n{version}".encode())
        within_run.update(f"\n{version}".encode())
    for content in contents:
        for digest in digests:
            digest.update(content)
    first, second, third = (digest.hexdigest()[:32] for digest in digests)
    return first, second, third


def unusual(axes: Axes, rank: int) -> list[str]:
    """What a fingerprint says of the axes: nothing of those that a tensor has where no others are named."""
    usual = ("bhnd" if axes.row_rank else "bhn")[-rank:]
    return [] if axes.order == usual else [str(axes)]


def _ask(array: zarr.Array[Any], location: str) -> tuple[list[str], list[bytes]]:
    """What a store says of the stored chunks, and a sample of them: one elsewhere is asked for both at once."""
    if isinstance(array.store, MappedStore):
        return [], _sample(array, location)
    with ThreadPool(2, "oocattn-ask") as pool:
        versions, contents = pool.submit(lambda: [*_versions(array)]), pool.submit(_sample, array, location)
        return versions.result(), contents.result()


def _versions(array: zarr.Array[Any]) -> Iterator[str]:
    """What a store elsewhere than in a local folder says of the stored chunks' content, where it says so."""
    store: Any = array.store
    chunks = (chunk_key(array, coordinates) for coordinates in stored_chunks(array))
    if not isinstance(store, GivenStore):
        found = sync(store.list_versions(array.path))
        yield from (f"{key} {found[key]}" for key in chunks if key in found)
        return
    object_bytes = math.prod(array.shards or array.chunks) * array.dtype.itemsize
    while batch := list(itertools.islice(chunks, ASKED)):
        yield from sync(store.find_versions(batch, object_bytes))


def identity(array: zarr.Array[Any]) -> dict[str, Any]:
    """What of an array's metadata says how its bytes are to be read."""
    metadata = array.metadata.to_dict()
    return {key: metadata[key] for key in _IDENTITY if key in metadata}


def chunk_files(array: zarr.Array[Any], location: str) -> Iterator[tuple[tuple[int, ...], str, os.stat_result]]:
    """Coordinates, key and status of the file of every chunk of a local array. Raises at the first that is missing."""
    if not isinstance(array.store, MappedStore):
        return
    for coordinates in stored_chunks(array):
        key = chunk_key(array, coordinates)
        with refuse_missing(location, key), name_failure("look at", array.store.root / key):
            status = os.stat(array.store.root / key)
        if not stat.S_ISREG(status.st_mode):
            raise damaged_chunk(location, key, "is no regular file: expected one")
        yield coordinates, key, status


def _sampled_keys(array: zarr.Array[Any]) -> Iterator[str]:
    """The keys of a few stored chunks, from the first to the last."""
    counts = stored_counts(array)
    total = math.prod(counts)
    for number in sorted({round(place * (total - 1) / (SAMPLED_CHUNKS - 1)) for place in range(SAMPLED_CHUNKS)}):
        yield chunk_key(array, coordinates_of(number, counts))


def _sample(array: zarr.Array[Any], location: str) -> list[bytes]:
    """The first and the last bytes of those chunks."""
    if isinstance(array.store, MappedStore):
        return [end for key in _sampled_keys(array) for end in _ends(array.store.root, key, location)]
    ends: list[ByteRequest] = [RangeByteRequest(0, SAMPLED_BYTES), SuffixByteRequest(SAMPLED_BYTES)]
    wanted = list(itertools.product(_sampled_keys(array), ends))
    contents = sync(all_of(array.store.get(key, buffer_prototype, part) for key, part in wanted))
    found = []
    for (key, _), content in zip(wanted, contents, strict=True):
        if content is None:
            raise missing_chunk(location, key)
        found.append(content.to_bytes())
    return found


def _ends(root: Path, key: str, location: str) -> list[bytes]:
    """The first and the last bytes of a file. No more is read: of a map the system reads megabytes ahead."""
    with refuse_missing(location, key), open_regular(root / key) as descriptor:
        advise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        last = max(0, os.fstat(descriptor).st_size - SAMPLED_BYTES)
        return [read_exactly(descriptor, SAMPLED_BYTES, start, root / key) for start in (0, last)]
