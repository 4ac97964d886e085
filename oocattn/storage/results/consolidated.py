"""Consolidated metadata of a result: what its arrays say, once more in the group's document, as Zarr and xarray read it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from oocattn.storage.files.durable import MOST_RECORD, read_json, write_text
from oocattn.storage.files.folders import names_in


def consolidate(group: Path, without: Collection[str] = ()) -> None:
    """Write what the arrays of a group in a folder say of themselves into its zarr.json, durably, `without` some of them.

    It is what `zarr.consolidate_metadata` writes, which does not sync it. Where that would be longer than what is read of a
    document, the group is left without.
    """
    document = read_json(group / "zarr.json") or {}
    found = {name: read_json(group / name / "zarr.json") for name in names_in(group) if name not in ("zarr.json", *without)}
    arrays = {name: metadata for name, metadata in found.items() if metadata is not None}
    text = consolidated(document, arrays)
    if text is not None:
        write_text(group / "zarr.json", text)


def consolidated(document: Mapping[str, Any], arrays: Mapping[str, Any]) -> str | None:
    """The document of a group with what its arrays say of themselves; None where that is longer than what is read of one."""
    found = {"kind": "inline", "must_understand": False, "metadata": arrays}
    text = json.dumps({**document, "consolidated_metadata": found}, indent=2)
    return text if len(text) <= MOST_RECORD else None
