"""Bounded reads of Zarr stores of every kind."""

from __future__ import annotations

from zarr.storage import FsspecStore, LocalStore

from oocattn.storage.zarr_compat import RangeByteRequest, Store, buffer_prototype


async def read_start(store: Store, key: str, most: int) -> bytes | None:
    """Read an object's first bytes, at most `most`; None where there is none.

    Not every store takes a range that ends past an object's end (Icechunk 1.1 panics): others than Zarr's own are asked for
    its size first.
    """
    stop = most
    if not isinstance(store, FsspecStore | LocalStore):
        try:
            stop = min(most, await store.getsize(key))
        except (FileNotFoundError, KeyError):  # KeyError: Icechunk's
            return None
    found = await store.get(key, buffer_prototype, RangeByteRequest(0, stop))
    return None if found is None else found.to_bytes()
