"""Paths and URLs of datasets and results, checked before Zarr sees them.

A URL can make fsspec connect to a host, run what that host sends, or import a module, so schemes are taken from a list.
What a caller typed (`parse_location`) may be a URL; what a file says (`recorded_location`) is a local path.
"""

from __future__ import annotations

import os
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote_to_bytes

from oocattn.errors import IntegrityError, ProblemError
from oocattn.naming import by_face, named
from oocattn.text import printable, without_credentials

if TYPE_CHECKING:  # Zarr takes half a second
    from zarr.storage import StorePath

SCHEMES = ("s3", "gs", "az", "abfs", "http", "https", "memory")
"""Schemes of remote stores. memory:// is fsspec's store within this process, for tests."""

MOST_NAME = 255
"""Bytes that the name of a file has at most."""

WRAPPERS = ("zip", "simplecache", "filecache", "blockcache")
"""Links that may stand before the last one of a chain such as `zip::s3://bucket/qkv.zip`: they do not interpret bytes as
code, and they open nothing but the next link."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_ADDRESS = re.compile(r"(?<=[/@])\[[0-9A-Fa-f:.]*\]")  # A host that is given as an address of IPv6, such as [::1]
_BYTES = re.compile("[\udc80-\udcff]")  # bytes of a path that are no UTF-8, as Python has them in a text
_TENSORS = (
    "save tensors with torch.save or numpy.save, write them to a dataset with oocattn.import_arrays(DATASET, q=FILE, "
    "k=FILE, v=FILE), and give DATASET"
)


@dataclass(frozen=True)
class Location:
    """A place that may be opened: an absolute path, or a URL (`path` is None). As a str it is without credentials."""

    text: str = field(repr=False)
    path: Path | None

    def __str__(self) -> str:
        return self.text if self.path is not None else without_credentials(self.text)


class OpenResult(Protocol):
    """A finished result that is open: a `Result`."""

    @property
    def result_place(self) -> Path | StorePath:
        """Where it is."""


def parse_location(typed: object, what: str = "dataset") -> Location:
    """The place that a caller names: a path, a URL or a chain.

    URLs have a scheme of `SCHEMES`, or file:. A Path is always a local path, and so is a text that begins with "/", "."
    or "~/", or that has no "://" and is the name of something that exists. `~` and `~USER` at the beginning are home
    folders, as in a shell. Raises ProblemError for anything else, which messages call `what`.
    """
    if isinstance(typed, Location):
        return typed
    text = _text(typed, what)
    if not isinstance(typed, str) or _is_local(text):
        return _parse_local(_expand_home(text))
    return _parse_chain(text) if is_chain(text) else _parse_url(text)


def is_chain(text: str) -> bool:
    """Whether a URL is a chain such as `zip::s3://bucket/qkv.zip`."""
    return "::" in _ADDRESS.sub("", text)


def recorded_location(text: object) -> Location:
    """The place of a dataset that a file names. Raises IntegrityError unless it is an absolute local path."""
    if isinstance(text, str) and text.startswith("/") and _is_printable(_BYTES.sub("", text)):
        return _parse_local(text)
    raise IntegrityError(
        f"the dataset is recorded as {text!r}: only an absolute local path is believed, and nothing is read "
        f"from there; if you trust that place, name it with {named('inputs')}"
    )


def is_file_name(name: str) -> bool:
    """Whether a text can be the name of a file in a folder."""
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return 0 < length <= MOST_NAME and name not in (".", "..") and "/" not in name and "\0" not in name


def resolve_path(path: Path) -> Path:
    """`path` without symbolic links. Raises ProblemError where they lead nowhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links: Python has had both
        raise ProblemError(f"{path} cannot be resolved ({error}): choose another path") from None


def output_path(typed: object, what: str) -> Path:
    """The absolute path of an output, which is local. Raises ProblemError for a URL, else as `parse_location`."""
    if isinstance(typed, str) and not (_is_local(typed) or typed.lower().startswith("file:")):
        raise ProblemError(
            f"{what} {typed}: {what}s are written to a local path, not to a URL: give a local path, and copy it from there"
        )
    path = parse_location(typed, what).path
    assert path is not None
    return path


def _text(typed: object, what: str) -> str:
    """The text of a path or URL. Raises ProblemError for an object that is neither."""
    found = typed
    with suppress(TypeError):
        found = os.fspath(typed)  # type: ignore[call-overload]
    if isinstance(found, str):
        return str(found)
    expected = {"dataset": "a path or a URL", "result": "a path, a URL or a Zarr store"}.get(what, "a local path")
    raise ProblemError(f"{what}: found {describe(found)}, expected {expected}{_remedy(found, what)}")


def _expand_home(text: str) -> str:
    """The path with its home folder in the place of `~`. Raises ProblemError where there is none for this user."""
    try:
        found = os.path.expanduser(text)
    except ValueError:  # a null character or a surrogate, which no path has
        return text
    if found.partition("/")[0] == "~":
        raise ProblemError(f"{text}: this user has no home folder; give an absolute path")
    return found


def _is_local(text: str) -> bool:
    if text.startswith(("/", ".", "~/")):
        return True
    if "://" in text:
        return False
    try:
        return os.path.lexists(text) or not ("::" in text or text.lower().startswith("file:"))
    except ValueError:  # a null character
        return True


def _parse_local(text: str) -> Location:
    if not text:
        raise ProblemError("an empty text is no location: expected a path or a URL")
    try:
        os.fsencode(text)
    except ValueError:
        text += "\0"  # no file system can have it, as with a null character
    if "\0" in text:
        raise ProblemError(f"{text!r} is no path: it has characters that a path cannot have")
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > MOST_NAME:
        raise ProblemError(f"{text!r:.80}... is no path: it has a name of {longest:,} bytes, more than {MOST_NAME}")
    try:
        path = Path(text).absolute()
    except FileNotFoundError:
        raise ProblemError(
            f"{text}: the current folder was removed: change to one that is there, or give an absolute path"
        ) from None
    return Location(str(path), path)


def _parse_url(text: str) -> Location:
    """A URL without a chain."""
    if text.lower().startswith("file:"):
        return _parse_file_url(text)
    found = _SCHEME.match(text)
    scheme = found[1].lower() if found else text.partition("://")[0]
    if found is None or scheme not in SCHEMES:
        raise ProblemError(
            f"{text} has the scheme {scheme!r}: expected a local path, or a URL that begins with "
            f"{', '.join(f'{name}://' for name in ('file', *SCHEMES))}; copy the data to one of these"
        )
    if not _is_printable(text):
        raise ProblemError(f"{text} has control characters: expected a URL without any")
    _refuse_credentials(scheme, text[found.end() :])
    return Location(f"{scheme}://{text[found.end() :]}", None)


def _refuse_credentials(scheme: str, rest: str) -> None:
    """Raise ProblemError for a URL that has credentials where its scheme has the name of a bucket."""
    if scheme in ("http", "https"):  # basic authentication
        return
    authority = rest.partition("/")[0]
    user, at, _ = authority.rpartition("@")
    is_container = scheme in ("az", "abfs") and ":" not in user  # CONTAINER@ACCOUNT
    if (at and not is_container) or (":" in authority and "@" in rest and not authority.startswith("arn:")):
        raise ProblemError(
            f"a URL of {scheme}:// has credentials before an @, where the name of its bucket is expected: give them with "
            f"{by_face('storage_options', '--storage-option KEY=VALUE')}, or in the environment, and the URL without them"
        )


def _parse_file_url(text: str) -> Location:
    """The path in a file: URL of this host, percent escapes decoded."""
    rest = text[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        rest = slash + path
        if host.lower() not in ("", "localhost"):
            raise ProblemError(f"{text} names the host {host!r}: expected file:///PATH")
    if not rest.startswith("/") or "?" in rest or "#" in rest:
        raise ProblemError(f"{text} is no absolute path: expected file:///PATH, with ? and # as %3F and %23")
    return _parse_local(os.fsdecode(unquote_to_bytes(rest)))


def _parse_chain(text: str) -> Location:
    """A chain as fsspec reads it: each link but the last wraps the next one."""
    *wrappers, last = text.split("::")
    for link in wrappers:
        if link.partition("://")[0] not in WRAPPERS or not _is_printable(link):
            raise ProblemError(
                f"{text} is a chain with the link {link!r}: expected {', '.join(WRAPPERS)} before the last link"
            )
    target = _parse_local(_expand_home(last)) if _is_local(last) else _parse_url(last)
    if target.path is not None and ("::" in target.text or not target.path.is_file()):
        raise ProblemError(f"{text}: {target.text} is no regular file: expected one at the chain's end")
    return Location("::".join((*wrappers, target.text)), None)


def _is_printable(text: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def describe(found: object) -> str:
    """An object in a few words: its type, and its shape or value."""
    if found is None:
        return "None"
    kind = type(found)
    module = kind.__module__.partition(".")[0].removeprefix("_")  # as of _io.BytesIO
    name = kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
    article = "an" if name[0] in "aeiouAEIO" else "a"
    shape = None
    with suppress(Exception):  # of a nested tensor it raises
        shape = getattr(found, "shape", None)
    if isinstance(shape, tuple):
        return f"{article} {name} {list(shape)}"
    if isinstance(found, int | float | bytes):
        return f"the {name} {printable(repr(found)):.80}"
    return f"{article} {name}"


def _remedy(found: object, what: str) -> str:
    if isinstance(found, bytes | bytearray):
        return ": decode it first, as with os.fsdecode"
    if (place := _place_in_zarr(found)) is not None:
        return place
    if what == "dataset" and (isinstance(found, list | tuple | dict) or hasattr(found, "shape")):
        return f": {_TENSORS}"
    return ""


def _place_in_zarr(found: Any) -> str | None:
    """What to give instead of an object of Zarr; None for anything else."""
    if not type(found).__module__.startswith("zarr."):
        return None
    store, name = getattr(found, "store", found), getattr(found, "path", "")
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        place = root / name if isinstance(name, str) else root
        group = place.parent if hasattr(found, "shape") else place
        return f", such as {str(group)!r}"
    return ": give the path or URL that it was opened from; if it is in memory, write it to a folder first"
