"""A Zarr store for what this process makes in a folder of its own, which is not read through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zarr.storage import LocalStore

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer


class OwnStore(LocalStore):
    """A `zarr.storage.LocalStore` in a folder of whose name nobody else knows.

    LocalStore makes what may not be there by a hard link, which not every file system has. Here nobody else makes it.
    """

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a key, unless it is there."""
        if not await self.exists(key):
            await self.set(key, value)
