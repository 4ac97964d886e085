"""What an exception of a library for remote stores means: missing, refused, for a while, or something else."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import Any

import pytest

from oocattn.storage.remote import transient
from oocattn.storage.remote.transient import Kind, classify


class NamedError(Exception):
    """One of a library that need not be installed."""

    def __init__(self, name: str, **fields: Any) -> None:
        super().__init__(f"{name} it is")
        vars(self).update(fields)


def of_library(name: str, **fields: Any) -> Exception:
    module, _, cls = name.rpartition(".")
    return type(cls, (NamedError,), {"__module__": f"{module}.exceptions"})(cls, **fields)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def boto(code: str, number: int) -> Exception:
    response = {"Error": {"Code": code, "Message": "so"}, "ResponseMetadata": {"HTTPStatusCode": number, "HTTPHeaders": {}}}
    return of_library("botocore.ClientError", response=response)


MEANINGS: list[tuple[Exception, Kind]] = [
    (TimeoutError(), Kind.TRANSIENT),
    (ConnectionResetError(errno.ECONNRESET, "reset"), Kind.TRANSIENT),
    (OSError(errno.EBUSY, "slow down"), Kind.TRANSIENT),
    (OSError(errno.EHOSTUNREACH, "no route"), Kind.TRANSIENT),
    (OSError(errno.EIO, "broken"), Kind.PERMANENT),
    (socket.gaierror(socket.EAI_AGAIN, "temporary failure"), Kind.TRANSIENT),
    (socket.gaierror(socket.EAI_NONAME, "unknown"), Kind.PERMANENT),
    (of_library("aiohttp.ClientConnectorDNSError", os_error=socket.gaierror(socket.EAI_NONAME, "unknown")), Kind.PERMANENT),
    (of_library("aiohttp.ClientPayloadError"), Kind.TRANSIENT),
    (
        of_library("aiohttp.ClientConnectorCertificateError", os_error=ssl.SSLCertVerificationError("self-signed")),
        Kind.PERMANENT,
    ),
    (caused(ConnectionError("handshake"), ssl.SSLEOFError(8, "eof")), Kind.TRANSIENT),
    (FileNotFoundError("x"), Kind.ABSENT),
    (caused(FileNotFoundError("x"), of_library("aiohttp.ClientResponseError", status=503)), Kind.TRANSIENT),
    (caused(FileNotFoundError("x"), of_library("aiohttp.ClientResponseError", status=404)), Kind.ABSENT),
    (caused(FileNotFoundError("x"), ConnectionResetError("reset")), Kind.TRANSIENT),
    (PermissionError("x"), Kind.DENIED),
    (caused(PermissionError("x"), boto("AccessDenied", 403)), Kind.DENIED),
    (caused(OSError(errno.EBUSY, "x"), boto("SlowDown", 503)), Kind.TRANSIENT),
    (caused(OSError(errno.EREMOTEIO, "x"), boto("InternalError", 500)), Kind.TRANSIENT),
    (caused(TimeoutError("x"), boto("RequestTimeout", 400)), Kind.TRANSIENT),
    (caused(OSError(errno.EIO, "x"), boto("NoSuchThing", 400)), Kind.PERMANENT),
    (of_library("botocore.NoCredentialsError"), Kind.DENIED),
    (of_library("botocore.FlexibleChecksumError"), Kind.TRANSIENT),
    (of_library("gcsfs.HttpError", code=503), Kind.TRANSIENT),
    (of_library("gcsfs.HttpError", code="401"), Kind.DENIED),
    (OSError("Forbidden: bucket/x\n"), Kind.DENIED),
    (of_library("azure.HttpResponseError", status_code=503), Kind.TRANSIENT),
    (of_library("azure.ResourceNotFoundError", status_code=404), Kind.ABSENT),
    (of_library("azure.ServiceRequestError"), Kind.TRANSIENT),
    (ExceptionGroup("several", [ConnectionResetError("reset")]), Kind.TRANSIENT),
    (ValueError("a bug"), Kind.PERMANENT),
]


@pytest.mark.parametrize(("error", "kind"), MEANINGS, ids=lambda value: f"{value!r:.60}")
def test_an_exception_of_any_file_system_means(error: Exception, kind: Kind) -> None:
    assert classify(error).kind is kind


def test_memory_that_runs_out_is_no_failure_of_the_server() -> None:
    async def step() -> None:
        raise MemoryError("8 GiB")

    with pytest.raises(MemoryError, match="8 GiB"):
        asyncio.run(transient.retry("reading", "https://host/x", step))
