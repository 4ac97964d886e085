"""An S3 server on the loopback, as zarr's own tests have it, and what is in it."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest

BUCKET = "bucket"
SECRET = "hunter2-of-the-bucket"


@contextmanager
def serving_s3(host: str = "127.0.0.1") -> Iterator[dict[str, Any]]:
    """Serve one empty bucket from a thread; yield the storage options."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address=host, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "abc", "secret": SECRET, "client_kwargs": {"region_name": "us-east-1"}}
        options["endpoint_url"] = f"http://{host}:{port}"
        client_of(options).create_bucket(Bucket=BUCKET)
        yield options
    finally:
        server.stop()


@contextmanager
def serving_s3_apart() -> Iterator[dict[str, Any]]:
    """The same from a process of its own: this one starts no thread, and may be forked."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    options = {"key": "abc", "secret": SECRET, "client_kwargs": {"region_name": "us-east-1"}}
    options["endpoint_url"] = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            client_of(options).create_bucket(Bucket=BUCKET)
            yield options
        finally:
            server.terminate()


def client_of(options: dict[str, Any]) -> Any:
    """A client of the server that is not ours, and starts no thread."""
    return _client(options["endpoint_url"])


@cache
def _client(url: str) -> Any:
    import boto3

    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="abc", aws_secret_access_key=SECRET, region_name="us-east-1"
    )


def objects_in(options: dict[str, Any], prefix: str = "") -> dict[str, bytes]:
    """The content of all objects whose key begins so."""
    client, found = client_of(options), dict[str, bytes]()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for each in page.get("Contents", []):
            found[each["Key"]] = client.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
    return found


def empty(options: dict[str, Any]) -> None:
    """Remove all objects, as moto does."""
    urllib.request.urlopen(f"{options['endpoint_url']}/moto-api/reset", b"").close()
    client_of(options).create_bucket(Bucket=BUCKET)
