"""Errors of tasks reach the driver as what they are, whatever caused them."""

from __future__ import annotations

import logging

import pytest
from distributed import Client

from oocattn import RemoteError
from oocattn.pipelines.engines.dask.lane_plugin import sendable_errors


class UnsendableError(Exception):
    """As errors of aiohttp, which hold headers."""

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("can't pickle headers")


def fail(raised: bool) -> None:
    with sendable_errors():
        try:
            raise OSError("a connection") from UnsendableError("503")
        except OSError as error:
            raise RemoteError("reading failed") from (error if raised else None)


@pytest.mark.parametrize("raised", [True, False], ids=["cause", "context"])
def test_an_error_whose_cause_cannot_be_sent_keeps_its_type(
    client: Client, caplog: pytest.LogCaptureFixture, raised: bool
) -> None:
    with caplog.at_level(logging.ERROR, "distributed"), pytest.raises(RemoteError, match=r"^reading failed$") as found:
        client.submit(fail, raised, pure=False).result(20)
    assert isinstance(found.value.__context__, OSError)
    assert not [record for record in caplog.records if "pickle" in record.getMessage()]
