"""Requests to a server that does not serve end with their call: at its time limit, or when it is interrupted."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

import oocattn
from oocattn import TimeLimitError, clock
from oocattn.cli.main import main
from oocattn.storage.remote import limits
from oocattn.storage.remote.limits import Limit, current_limit, limited
from oocattn.storage.remote.transient import retry

URL = "s3://bucket/q/zarr.json"


async def silent() -> None:
    await asyncio.sleep(600)


async def refused() -> None:
    raise ConnectionRefusedError("nobody listens")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("END_SECONDS", "LOOK_SECONDS", "LAST_LOOK_SECONDS"):
        monkeypatch.setattr(limits, name, 0.01)


@pytest.mark.parametrize("step", [silent, refused])
def test_a_request_ends_at_the_time_limit_and_names_its_server(step: Callable[[], Awaitable[None]]) -> None:
    with limited(clock.now() + 0.05) as limit, pytest.raises(TimeLimitError, match=f"time limit .* reading {URL} failed"):
        asyncio.run(retry("reading", URL, step))
    assert limit.failing.startswith(f"reading {URL}: ")


@pytest.mark.parametrize("step", [silent, refused])
def test_a_request_ends_where_its_call_is_interrupted_from_another_thread(step: Callable[[], Awaitable[None]]) -> None:
    with limited(float("inf")) as limit:
        threading.Timer(0.05, limit.stop).start()
        with pytest.raises(TimeLimitError, match=f"interrupted: reading {URL} failed"):
            asyncio.run(retry("reading", URL, step))


def test_a_request_that_is_answered_after_the_limit_still_counts() -> None:
    async def late() -> str:
        return "released"

    with limited(clock.now() - 10):
        assert asyncio.run(retry("removing", URL, late)) == "released"


def test_a_limit_is_the_same_wherever_it_is_sent_in_its_process() -> None:
    with limited(clock.now()) as limit:
        assert current_limit() is limit
        assert pickle.loads(pickle.dumps(limit)) is limit
    assert current_limit().over_since == Limit().over_since == math.inf


def test_what_a_call_found_of_a_server_counts_for_the_call_around_it() -> None:
    asked: list[str] = []

    async def answered() -> None:
        asked.append("a server")

    with limited(math.inf) as outer:
        with limited(clock.now()), pytest.raises(TimeLimitError):
            asyncio.run(retry("reading", URL, silent))
        assert outer.failing.startswith(f"reading {URL}: no answer in time")
        with limited(clock.now()):
            with pytest.raises(TimeLimitError, match="nor was there one before"):
                asyncio.run(retry("writing", f"{URL}.2", answered))
            assert not asked
            assert outer.failing.startswith(f"reading {URL}: no answer in time")  # of the one that was made
            asyncio.run(retry("writing", "s3://another/q", answered))
            assert asked


@pytest.mark.parametrize("step", [silent, refused])
def test_requests_that_follow_an_interruption_share_one_bound(
    step: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    async def made(number: int) -> None:
        asked.add(number)
        await step()

    monkeypatch.setattr(limits, "END_SECONDS", 0.2)
    with limited(math.inf) as limit:
        limit.stop()
        for number in range(40):
            with pytest.raises(TimeLimitError):
                asyncio.run(retry("removing", f"{URL}.{number}", partial(made, number)))
    assert 1 <= len(asked) <= 2  # the bound of the first one ends a moment before that of its server


def test_a_server_that_answers_has_its_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> str:
        await asyncio.sleep(0.3)
        return "released"

    monkeypatch.setattr(limits, "END_SECONDS", 1.0)
    with limited(math.inf) as limit:
        limit.stop()
        for number in range(5):
            assert asyncio.run(retry("removing", f"{URL}.{number}", slow)) == "released"


def test_a_request_that_is_answered_names_no_server() -> None:
    async def answered() -> None:
        pass

    with limited(float("inf")) as outer, limited(float("inf")) as inner:
        inner.failing = f"reading {URL}: 503"
        asyncio.run(retry("reading", URL, answered))
        assert not outer.failing


def test_an_interrupted_command_asks_a_dead_store_how_to_go_on_for_a_moment(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        current_limit().failing = f"writing {URL}: 503"
        raise KeyboardInterrupt

    asked: list[str] = []

    def status(*_: object, **__: object) -> None:
        asked.append("status")
        asyncio.run(retry("reading", URL, refused))  # for a minute, were it not for the limit

    monkeypatch.setattr(oocattn, "attention", interrupted)
    monkeypatch.setattr(oocattn, "status", status)
    monkeypatch.setattr("oocattn.storage.remote.transient.FIRST_PAUSE", 600)
    assert main(["run", str(dataset), "s3://bucket/out.zarr"]) == 130
    assert asked == ["status"]
    assert capfd.readouterr().err == f"oocattn: interrupted; writing {URL}: 503: check that server and the network\n"
