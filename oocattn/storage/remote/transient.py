"""What a failure of a remote store means, and another try where that can help.

Every file system of fsspec has exceptions of its own. They are told apart here and nowhere else, by status code or by
type; none of their packages is imported.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from enum import Enum
from http import HTTPStatus
from typing import Any, TypeVar

from oocattn import clock
from oocattn.errors import OocattnError, RemoteDeniedError, RemoteError, TimeLimitError
from oocattn.naming import by_face
from oocattn.storage.remote.limits import Limit, Request, current_limit
from oocattn.storage.remote.options import without_secrets

PATIENCE = 60.0  # seconds after its first failure until which a request is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 8.0
"""Seconds between two tries: at first, and at most. They double; up to half is taken off, so that clients come apart."""

WARNING_SECONDS, SILENT_SECONDS = 5.0, 30.0
"""Seconds of failing after which it is logged that a request is tried again, and least seconds between two such lines."""

TRY_SECONDS = 600.0  # seconds that one try may take, whatever the server sends meanwhile
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, *range(520, 525), 529}
"""Status codes after which the same request may be answered: from 520 on as content delivery networks give them."""

_ABSENT, _DENIED = {404, 410}, {401, 403, 407}

_TRANSIENT_CODES = {
    *("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"),
    *("ConditionalRequestConflict", "OperationAborted"),
}
"""Error codes of S3; of them RequestTimeout comes with status 400, the last two, of writes at the same time, with 409."""

_TRANSIENT_ERRNO = {
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET),
}

_TRANSIENT_TYPES = {
    *("aiohttp.ClientPayloadError", "aiohttp.ServerConnectionError", "aiohttp.HttpProcessingError"),
    *("botocore.HTTPClientError", "botocore.IncompleteReadError", "aiobotocore.AioReadTimeoutError"),
    "botocore.FlexibleChecksumError",
    *("azure.ServiceRequestError", "azure.ServiceResponseError"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError", "requests.ContentDecodingError"),
    *("google.TransportError", "gcsfs.ChecksumError", "urllib3.ProtocolError", "http.IncompleteRead"),
}
"""Packages and classes, with all that inherit from these, of connections that broke and bodies that were cut."""

_warned = 0.0  # when it was logged last: where a server fails, many requests do at once

logger = logging.getLogger("oocattn")

T = TypeVar("T")


class Kind(Enum):
    """What a failure means."""

    TRANSIENT = "the same request may be answered later"
    ABSENT = "there is no such object"
    DENIED = "the server refuses to say"
    PERMANENT = "the same request will fail again"


@dataclass(frozen=True)
class Failure:
    """The meaning of an exception: what was found, and what to do. The server asks to wait `wait` seconds."""

    kind: Kind
    found: str
    advice: str = ""
    wait: float = 0.0


async def retry(
    operation: str,
    url: str,
    step: Callable[[], Awaitable[T]],
    patience: float = PATIENCE,
    *,
    secrets: tuple[str, ...] = (),
    limit: Limit | None = None,
) -> T:
    """Await a repeatable step; retry transient failures for `patience` seconds. Messages show no `secrets`.

    Raises FileNotFoundError where the object does not exist, RemoteDeniedError where that is not said, TimeLimitError where
    `limit` (default: that of the call) is over, and RemoteError for every other failure: with the operation, the URL, what
    the server said, and how often it was tried.
    """
    global _warned
    label = f"{operation} {url}"
    request = Request(limit or current_limit(), label, url)
    first, pause, tries = None, FIRST_PAUSE, 0
    while True:
        tries += 1
        try:
            found = await request.wait(step, TRY_SECONDS)
            request.answered()
            return found
        except (OocattnError, MemoryError):
            raise
        except Exception as error:  # each file system has its own
            failure, now = _without_secrets(classify(error), secrets), clock.now()
            cause = error if not secrets else None  # its text may show them
            if failure.kind is Kind.ABSENT:
                request.answered()
                raise FileNotFoundError(errno.ENOENT, "no such object", url) from cause
            if failure.kind is not Kind.TRANSIENT:
                request.answered(failure.found)
                raise _error(operation, url, failure, tries, now - request.began) from cause
            first = now if first is None else first
            wait = max(pause * random.uniform(0.5, 1.0), failure.wait)
            request.failed(failure.found)
            if request.is_over:
                raise _over_error(label, failure, tries, now - request.began) from cause
            if now + wait > first + patience:
                raise _error(operation, url, failure, tries, now - request.began) from cause
            if now + wait > max(first + WARNING_SECONDS, _warned + SILENT_SECONDS):
                _warned = now
                left = first + patience - now
                logger.warning("%s %s failed: %s; retrying for %.0f s", operation, url, failure.found, left)
        await request.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


def _over_error(label: str, failure: Failure, tries: int, seconds: float) -> TimeLimitError:
    return TimeLimitError(
        f"time limit reached, or interrupted: {label} failed: {failure.found}; {tries} tries in {seconds:.0f} s; check the "
        "server and the network, then go on (`oocattn resume` for a run)"
    )


def _error(operation: str, url: str, failure: Failure, tries: int, seconds: float) -> RemoteError:
    advice = failure.advice
    if failure.kind is Kind.TRANSIENT:
        asked = f"; it asks to wait {failure.wait:.0f} s" if failure.wait else ""
        advice = (
            f"{tries} tries in {seconds:.0f} s{asked}; check the server and the network, then try again "
            f"({by_face('oocattn.resume', '`oocattn resume`')} for a run)"
        )
    elif failure.kind is Kind.DENIED and operation in ("writing", "removing"):
        options = by_face("storage_options", "--storage-option")
        advice = f"not allowed: check whether the credentials, of {options} or the environment, may write and remove there"
    kind = RemoteDeniedError if failure.kind is Kind.DENIED else RemoteError
    return kind(f"{operation} {url} failed: {failure.found}; {advice}")


def _without_secrets(failure: Failure, secrets: tuple[str, ...]) -> Failure:
    return replace(failure, found=without_secrets(failure.found, secrets)) if secrets else failure


def classify(error: BaseException) -> Failure:
    """Classify an exception by the first status code in its chain, or by types."""
    chain = list(_causes(error))
    garbled = any("aiohttp.HttpProcessingError" in _names(each) for each in chain)  # with status codes of aiohttp's own
    for each in () if garbled else chain:
        if (found := _by_status(each)) is not None:
            return found
    for each in chain:
        if (found := _by_type(each)) is not None:
            return found
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return Failure(Kind.ABSENT, str(error))
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # as gcsfs has it
        return _denial(str(error))
    return Failure(Kind.PERMANENT, f"{type(error).__name__}: {error}", "check the URL and the server")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it; of a group, the first of its members."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
            continue
        inner = getattr(error, "os_error", None)  # as aiohttp wraps it
        context = None if error.__suppress_context__ else error.__context__
        error = inner if isinstance(inner, BaseException) else error.__cause__ or context


def status_of(error: BaseException) -> int | None:
    """The first HTTP status code in the chain of an exception; None without one."""
    found = (_status(each, _described(each).get("ResponseMetadata", {})) for each in _causes(error))
    return next((status for status in found if status is not None), None)


def _described(error: BaseException) -> Mapping[str, Any]:
    """What botocore says of a response; nothing for others."""
    response: Any = getattr(error, "response", None)
    return response if isinstance(response, Mapping) else {}


def _by_status(error: BaseException) -> Failure | None:
    response: Any = getattr(error, "response", None)
    described = _described(error)
    metadata, said = described.get("ResponseMetadata", {}), described.get("Error", {})
    status = _status(error, metadata)
    if status is None:
        return None
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    words = str(said.get("Message") or getattr(error, "message", "") or phrase)
    found = f"the server says {status} {words}".rstrip()
    if status in _TRANSIENT or said.get("Code") in _TRANSIENT_CODES:
        headers = metadata.get("HTTPHeaders") or getattr(error, "headers", None) or getattr(response, "headers", None) or {}
        return Failure(Kind.TRANSIENT, found, wait=_retry_after(headers))
    if status in _ABSENT:
        return Failure(Kind.ABSENT, found)
    if status in _DENIED:
        return _denial(found)
    return Failure(Kind.PERMANENT, found, "check the URL and the server")


def _status(error: BaseException, metadata: Mapping[str, Any]) -> int | None:
    """The HTTP status code of an exception, by any library's name for it."""
    named = (getattr(error, name) for name in ("status", "status_code", "code") if hasattr(error, name))
    text = str(metadata.get("HTTPStatusCode") or next(named, None))
    return int(text) if text.isascii() and text.isdigit() and 300 <= int(text) < 600 else None


def _retry_after(headers: Any) -> float:
    """Seconds of the header Retry-After, a number or a date, or 0."""
    names = {str(name).lower(): str(value) for name, value in dict(headers).items()}
    text = names.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (OverflowError, TypeError, ValueError):
        return 0.0


def _by_type(error: BaseException) -> Failure | None:
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        advice = "check the URL and the server's certificate; a certificate of your own is trusted by SSL_CERT_FILE"
        return Failure(Kind.PERMANENT, f"TLS: {error}", advice)
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return Failure(Kind.PERMANENT, f"unknown host ({error.strerror or error})", "check the host's name in the URL")
    names = _names(error)
    if "aiohttp.TooManyRedirects" in names:
        return Failure(Kind.PERMANENT, "it redirects again and again", "check the URL")
    if isinstance(error, TypeError) and "keyword argument" in str(error):
        return Failure(Kind.PERMANENT, str(error), "check the names of the storage options")
    if isinstance(error, TimeoutError):
        return Failure(Kind.TRANSIENT, f"no answer in time ({error or type(error).__name__})")
    transient = isinstance(error, OSError) and (error.errno in _TRANSIENT_ERRNO or isinstance(error, socket.gaierror))
    if transient or isinstance(error, ConnectionError) or names & _TRANSIENT_TYPES:
        return Failure(Kind.TRANSIENT, str(error) or type(error).__name__)
    if names & {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "google.DefaultCredentialsError"}:
        return _denial(str(error))
    return None


def _names(error: BaseException) -> set[str]:
    """Packages and classes of an exception."""
    return {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}


def _denial(found: str) -> Failure:
    return Failure(
        Kind.DENIED,
        found,
        "not allowed, or missing (servers that do not allow listing, such as S3, answer so): check the URL and the "
        "credentials in the environment; a public S3 bucket needs "
        + by_face("storage_options={'anon': True}", "--storage-option anon=true"),
    )
