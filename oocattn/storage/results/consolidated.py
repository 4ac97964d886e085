"""Consolidated metadata of a result: what its arrays say, once more in the group's document, as Zarr and xarray read it."""

from __future__ import annotations

import json
from pathlib import Path

from oocattn.storage.files.durable import MOST_RECORD, read_json, write_text
from oocattn.storage.files.folders import names_in


def consolidate(group: Path) -> None:
    """Write what the arrays of a group in a folder say of themselves into its zarr.json, durably.

    It is what `zarr.consolidate_metadata` writes, which does not sync it. Where that would be longer than what is read of a
    document, the group is left without.
    """
    document = read_json(group / "zarr.json") or {}
    found = {name: read_json(group / name / "zarr.json") for name in names_in(group) if name != "zarr.json"}
    arrays = {name: metadata for name, metadata in found.items() if metadata is not None}
    document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
    text = json.dumps(document, indent=2)
    if len(text) <= MOST_RECORD:
        write_text(group / "zarr.json", text)
