"""Calls to a cluster: what is given up ends without a word."""

from __future__ import annotations

import asyncio
import gc

import pytest
from distributed import Client

from oocattn.pipelines.engines.dask.cluster import begin


def test_a_call_that_is_given_up_logs_nothing(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    began = asyncio.Event()

    async def hang() -> None:
        began.set()
        await asyncio.sleep(60)

    call = begin(client, hang)
    begin(client, began.wait).result(10)
    call.cancel()
    begin(client, lambda: asyncio.sleep(0.01)).result(10)  # the loop has dealt with it
    del call
    gc.collect()
    begin(client, lambda: asyncio.sleep(0)).result(10)
    assert not [record for record in caplog.records if record.name == "asyncio"]
