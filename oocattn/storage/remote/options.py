"""Storage options: what a caller gives for the file systems behind URLs. They hold credentials, and are never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import unquote

from oocattn.errors import ProblemError
from oocattn.storage.locations import SCHEMES, WRAPPERS
from oocattn.text import without_credentials

StorageOptions: TypeAlias = Mapping[str, Any]
"""Options of fsspec's file system, such as {"anon": True}."""

_NAMES = ("file", *SCHEMES, *WRAPPERS)

LEAST_SECRET = 4  # characters of a value that messages hide: shorter ones are in many words


def parse_options(name: str, given: object) -> dict[str, Any]:
    """The storage options that a caller gives as argument `name`. Raises ProblemError, which shows no value."""
    if not isinstance(given, Mapping):
        raise ProblemError(f'{name} is of type {type(given).__name__}: expected a mapping, such as {{"anon": True}}')
    for key in given:
        if not isinstance(key, str):
            raise ProblemError(f'{name} has a key of type {type(key).__name__}: expected texts, such as {{"anon": True}}')
    return dict(given)


def by_protocol(url: str, options: StorageOptions | None) -> dict[str, Any]:
    """The options of each link of a URL or chain, as fsspec takes them.

    They are those of the last link, but for mappings under the name of a scheme or link.
    """
    *wrappers, last = url.split("::")
    links = [*(link.partition("://")[0] for link in wrappers), last.partition("://")[0] if "://" in last else "file"]
    found: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key in _NAMES and isinstance(value, Mapping):
            if key in links:
                found[key] = {**found.get(key, {}), **value}
        else:
            found[links[-1]] = {**found.get(links[-1], {}), key: value}
    return found


def shown_options(options: StorageOptions | None) -> dict[str, Any]:
    """The options as messages may show them: `...` in the place of every value that may be a secret."""
    return {key: ... if _may_be_secret(value) else value for key, value in (options or {}).items()}


def _may_be_secret(value: object) -> bool:
    return not (value is None or isinstance(value, bool)) and not (isinstance(value, str) and _is_place(value))


def secrets_in(url: str) -> tuple[str, ...]:
    """The user and password of a URL or chain, as they stand there and decoded: texts that no message may show."""
    found = re.findall(r"://([^/?#\s]*)@", url)
    parts = {part for user in found for part in (user, user.partition(":")[2])}
    return secrets_of([*parts, *map(unquote, parts)])


def secrets_of(options: object) -> tuple[str, ...]:
    """The texts in options that no message may show. Places without credentials are not among them."""
    found = {text for text in _texts(options) if len(text) >= LEAST_SECRET and not _is_place(text)}
    return tuple(sorted(found, key=len, reverse=True))


def without_secrets(text: str, secrets: tuple[str, ...]) -> str:
    """A text with `***` in the place of each secret."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _texts(options: object) -> Iterator[str]:
    if isinstance(options, Mapping):
        for value in options.values():
            yield from _texts(value)
    elif isinstance(options, list | tuple | set):
        for value in options:
            yield from _texts(value)
    elif isinstance(options, bytes):
        yield options.decode(errors="replace")
    elif isinstance(options, str):
        yield options


def _is_place(text: str) -> bool:
    return "://" in text and without_credentials(text) == text
