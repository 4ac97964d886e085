"""A headless Chromium that opens a page, is asked what it shows, and takes a picture of it."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tornado.websocket import WebSocketClientConnection, websocket_connect

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1280,1250",
]


def look_at(url: str, shown: str, picture: Path, seconds: float = 60.0) -> list[str]:
    """Open a page, wait until an expression of JavaScript is true, take a picture; return the errors of the page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"ws://([^/]*)", line) for line in process.stderr)))
            return asyncio.run(_look(found[1], url, shown, picture, seconds))
        finally:
            process.kill()
            process.wait()


async def _look(address: str, url: str, shown: str, picture: Path, seconds: float) -> list[str]:
    tabs = json.load(urllib.request.urlopen(f"http://{address}/json", timeout=30))
    target = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    browser, errors = await websocket_connect(target, max_message_size=1 << 28), []
    await _ask(browser, errors, "Runtime.enable")
    await _ask(browser, errors, "Page.navigate", url=url)
    until = time.monotonic() + seconds
    while not (await _ask(browser, errors, "Runtime.evaluate", expression=f"!!({shown})"))["result"].get("value"):
        assert time.monotonic() < until, f"{url} does not show {shown}"
        await asyncio.sleep(0.3)
    drawn = await _ask(browser, errors, "Page.captureScreenshot", format="png")
    picture.write_bytes(base64.b64decode(drawn["data"]))
    browser.close()
    return errors


async def _ask(browser: WebSocketClientConnection, errors: list[str], method: str, **parameters: Any) -> dict[str, Any]:
    """The result of a call of the DevTools protocol; exceptions of the page meanwhile are added to `errors`."""
    await browser.write_message(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        message = json.loads(await browser.read_message() or "{}")
        if message.get("method") == "Runtime.exceptionThrown":
            errors.append(json.dumps(message["params"])[:500])
        if "id" in message:
            return dict(message["result"])
