"""The JSON documents of Zarr groups and arrays, read without Zarr.

They are read with a bound, and parsed. What they say of an array is checked in `metadata`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from oocattn.errors import IntegrityError, RemoteDeniedError
from oocattn.records import Count, Excerpt, from_json, parse_json
from oocattn.storage.chunk_errors import refuse_html
from oocattn.storage.files.operations import words_of
from oocattn.storage.files.regular import read_file

MOST_BYTES = 64 << 20
"""Of one document; the checksums of a result are in the attributes of its arrays."""

Read = Callable[[str], bytes | None]
"""The content of a key of a store; None where there is none. Raises RemoteDeniedError where a server may not tell."""

_V2_NAMES = {"f2": "float16", "f4": "float32", "f8": "float64"}

Node = tuple[str, dict[str, Any]]
"""Kind of a node, "group" or "array", and its metadata; of format 2 with its attributes."""


class StoredGroup(Protocol):
    """A group that lies in no folder; `str` is what messages call it."""

    store: Any
    """The Zarr store that it is in."""

    path: str
    """Where in that store; "" for its root."""

    def read(self, key: str) -> bytes | None:
        """The content of an object of the group; None where there is none."""


def reader_of(group: Path | StoredGroup) -> Read:
    """What reads the documents of a group, in a folder or not."""
    return partial(read_in_folder, group) if isinstance(group, Path) else group.read


def group_attributes(group: Path | StoredGroup) -> dict[str, Any]:
    """The attributes of a group; none where no group is. Raises IntegrityError where it is damaged."""
    return read_attributes(reader_of(group), str(group))


def read_attributes(read: Read, location: str) -> dict[str, Any]:
    """As `group_attributes`, of the group at the root of a store."""
    found = read_group(read, location)
    return {} if found is None else attributes_of(found, location)


@dataclass(frozen=True)
class ArrayNode(Excerpt):
    """Some of an array's metadata; `dtype` is without the byte order."""

    shape: tuple[Count, ...]
    dtype: str
    attributes: Mapping[str, Any]


def read_array(group: Path | StoredGroup, name: str) -> ArrayNode:
    """Read an array of a group. Raises IntegrityError where it is missing or damaged."""
    node = read_node(reader_of(group), name, str(group))
    if node is None or node[0] != "array":
        raise IntegrityError(f"{group} has no array {name!r}: expected a finished result; copy it again")
    kind = node[1].get("data_type", node[1].get("dtype"))
    kind = _V2_NAMES.get(kind[1:], kind) if isinstance(kind, str) else kind
    try:
        return from_json(ArrayNode, {**node[1], "dtype": kind, "attributes": attributes_of(node[1], f"{group}/{name}")})
    except ValueError as error:
        raise damaged_metadata(node_name(name, str(group)), str(error)) from None


def read_in_folder(folder: Path, key: str) -> bytes | None:
    """The content of a file in a folder; None where there is none. Raises IntegrityError for what is no such file."""
    try:
        return read_file(folder / key, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise IntegrityError(f"{folder}: {key} cannot be read ({words_of(error)})") from error


def read_group(read: Read, location: str) -> dict[str, Any] | None:
    """The metadata of the group at the root of a store; None where no group is. Raises IntegrityError if it is damaged."""
    node = read_node(read, "", location)
    if node is None or node[0] != "group":
        return None
    attributes_of(node[1], location)
    return node[1]


def read_node(read: Read, path: str, location: str) -> Node | None:
    """Read a node; None where there is none. Raises RemoteDeniedError where a server lets no document be read."""
    denied: list[RemoteDeniedError] = []

    def document(name: str) -> dict[str, Any] | None:
        try:
            return read_document(read, path, name, location)
        except RemoteDeniedError as error:  # also the answer for a missing object, where listing is not allowed
            denied.append(error)
            return None

    if (found := document("zarr.json")) is not None:
        kind = found.get("node_type")
        if type(found.get("zarr_format")) is not int or found["zarr_format"] != 3 or kind not in ("array", "group"):
            raise damaged_metadata(node_name(path, location), "it is neither a group nor an array of Zarr format 3")
        return str(kind), found
    for key, kind in ((".zarray", "array"), (".zgroup", "group")):
        if (found := document(key)) is not None:
            if type(found.get("zarr_format")) is not int or found["zarr_format"] != 2:
                raise damaged_metadata(node_name(path, location), f"{key} is not of Zarr format 2")
            return kind, {**found, "attributes": document(".zattrs") or {}}
    if denied:
        raise denied[0]
    return None


def read_document(read: Read, path: str, name: str, location: str) -> dict[str, Any] | None:
    """The JSON object in one document of the node at `path`; None where there is none."""
    content = read(f"{path}/{name}" if path else name)
    if content is None:
        return None
    try:
        return parse_json(content, not_finite=True)
    except ValueError as error:
        refuse_html(f"{name} of {node_name(path, location)}", content)
        raise damaged_metadata(node_name(path, location), f"{name} is {error}") from None


def attributes_of(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The attributes of a node. Raises IntegrityError, calling it `name`, where they are no object."""
    attributes = node.get("attributes", {})
    if not isinstance(attributes, dict):
        raise damaged_metadata(name, "its attributes are no object")
    return attributes


def node_name(path: str, location: str) -> str:
    """What messages call the node at a path of a store."""
    return f"array {path!r} of {location}" if path else location


def damaged_metadata(name: str, reason: str) -> IntegrityError:
    """The error for metadata that cannot be what somebody wrote."""
    return IntegrityError(f"the metadata of {name} is damaged: {reason}; copy it again")
