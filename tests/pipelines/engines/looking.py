"""What the page of a run shows, and what the events of the run say."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from bokeh.client import pull_session
from bokeh.document import Document
from bokeh.protocol.messages.patch_doc import patch_doc
from distributed import Client

from oocattn import Attended, Event, Recovered, Saved, Staged, Started, Written
from oocattn.pipelines.lane.lane import Lane


def opened(client: Client, query: str = "") -> Document:
    """The document of the page, as a browser that opens it now has it."""
    url = re.sub(
        r"//[^/]*:(\d+)/\w+$", r"//127.0.0.1:\1/oocattn", client.dashboard_link
    )  # Dask names the host, not where it listens
    urlopen(url, timeout=30).close()  # the first page that is asked for opens them all
    arguments = {"run": query} if query else {}
    with pull_session(url=url, arguments=arguments) as session:
        return session.document


def source(document: Document, name: str) -> Any:
    return document.select_one({"name": name}).data


def headline(document: Document) -> str:
    return str(document.select_one({"name": "headline"}).text)


def text(document: Document, name: str) -> str:
    """The words of a part of the page, without markup."""
    return html.unescape(re.sub("<[^>]*>", " ", document.select_one({"name": name}).text))


@dataclass(frozen=True)
class Look:
    """What the page showed after some events of a run, and when it was looked at."""

    events: list[Event]
    document: Document
    before: float
    after: float

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.kind == kind]

    def amounts(self, name: str) -> Iterator[tuple[float, float, float]]:
        """Amounts that the events tell of, and from when to when they were done."""
        for event in self.events:
            match name, event:
                case "tokens", Attended():
                    amount = event.pairs / 131  # pairs of a token, of both heads
                case ("read", Staged()) | ("written", Written()):
                    amount = event.bytes
                case _:
                    continue
            yield amount, min(span.start for span in event.spans), max(span.stop for span in event.spans)

    @property
    def done(self) -> int:
        """Subproblems that are done."""
        done = 0
        for event in self.events:
            done = 26 - event.left if isinstance(event, Started | Recovered) else done + isinstance(event, Attended)
        return done

    @property
    def saved(self) -> float:
        """When something was brought to disk for good."""
        written = [event.stop for event in self.events if isinstance(event, Written | Saved)]
        return max(written + [event.checkpointed for event in self.of("attended")])


def shown(name: str) -> str:
    """The expression of JavaScript for the words of a part of the page."""
    return f"(window.Bokeh?.documents[0]?.get_model_by_name('{name}')?.text ?? '')"


class FailingOnce:
    """The attend of a lane that fails the first time that it comes to a turn."""

    def __init__(self, turn: int) -> None:
        self._turn, self._real = turn, Lane.attend

    def __call__(self, lane: Lane, turn: int) -> Attended:
        if turn == self._turn:
            self._turn = -1
            raise OSError(5, "<Input/output error>")
        return self._real(lane, turn)


class Changes:
    """What a document sends to a browser."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def _document_patched(self, event: Any) -> None:
        self._events.append(event)

    def take_bytes(self) -> int:
        """The bytes of a message with the changes since the last one."""
        message = patch_doc.create(self._events)
        self._events.clear()
        texts = len(message.header_json) + len(message.metadata_json) + len(message.content_json)
        return texts + sum(len(each.to_bytes()) for each in message.buffers)
