"""Text from outside, made fit to print: names, locations and messages."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that move a cursor, break a line or show nothing."""

MOST_SHOWN = 2000  # characters of a text that are printed at most

_USER = re.compile(
    r"(https?://)[^/?#\n]*@"
    r"|(://)(?!\[)(?:[^/?#\s@]*:[^/?#\n]*@|[^/?#\s:@]*:(?!\d{0,5}(?:[/?#\s'\",;)]|$))\S*@)"  # last: a slash in a password
)
_SECRET = re.compile(r"([?&][^=&#\s]*(?:sig|token|key|secret|passw|credential|auth)[^=&#\s]*=)[^&#\s'\"]+", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """The text with URLs without user, password, and values of keys and signatures."""
    return text if "://" not in text else _SECRET.sub(r"\1***", _USER.sub(r"\1\2", text))


def printable(text: object) -> str:
    """The text on one line, with control characters, line breaks and surrogates as escapes such as `\\x1b`.

    URLs are without credentials. What is longer than `MOST_SHOWN` characters is cut.
    """
    found = without_credentials(str(text))
    cut = found if len(found) <= MOST_SHOWN else f"{found[:MOST_SHOWN]}..."
    if cut.isprintable():  # as nearly all are; it is quick to see
        return cut
    return "".join(_escaped(character) if unicodedata.category(character) in _HIDDEN else character for character in cut)


def shell_command(words: Iterable[str]) -> str:
    """The words as a line for a shell, on which `printable` finds nothing to escape: it names the same files once pasted."""
    return " ".join(shlex.quote(word) if _is_plain(word) else _quoted_bytes(word) for word in words)


def some_of(names: Sequence[str], most: int) -> str:
    """The first of the names, fit to print, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def display_width(text: str) -> int:
    """Columns of a text in a font of one width, where wide characters take two."""
    return sum(1 + (unicodedata.east_asian_width(character) in ("W", "F")) for character in text)


def _is_plain(word: str) -> bool:
    return not any(unicodedata.category(character) in _HIDDEN for character in word)


def _quoted_bytes(word: str) -> str:
    """A word in the quotes of bash, zsh and POSIX 2024 that know escapes, with hidden characters as the bytes of a path."""
    parts = []
    for character in word:
        if unicodedata.category(character) in _HIDDEN:
            errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
            parts.append("".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors)))
        else:
            parts.append(f"\\{character}" if character in "\\'" else character)
    return f"$'{''.join(parts)}'"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
