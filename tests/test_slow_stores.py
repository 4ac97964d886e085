"""Runs on stores that let each request wait: enough requests are under way, within the budgets, for the same bits."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from http_server import serving
from object_store import BUCKET, client_of, serving_s3_apart
from slow_store import SlowStore, slowing
from support import assert_same_bits

import oocattn
from oocattn.pipelines.watch.events import Staged, Started, Written
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import changed_arrays

LATENCY = 0.1
UNLIMITED = 1e12
TOKENS, HEADS, DIM, CHUNK = 3 * 2**13, 2, 32, 2**11
"""The inputs have 72 chunks of 128 KiB; those of a plan with three chunks are whole ones."""

STORED: dict[str, dict[str, Any]] = {
    "plain": {"compressors": None},
    "zstd": {},
    "shards": {"shards": (1, 1, TOKENS // 2, DIM), "compressors": None},
}


def write_inputs(folder: Path, tokens: int = TOKENS, heads: int = HEADS, chunk: int = CHUNK, **storage: Any) -> Path:
    """q, k and v of random numbers, float16 [1, heads, tokens, DIM], in chunks of so many tokens."""
    group, rng = zarr.open_group(folder, mode="w"), np.random.default_rng(0)
    for name in "qkv":
        shape, chunks = (1, heads, tokens, DIM), (1, 1, chunk, DIM)
        array = group.create_array(name, shape=shape, dtype="f2", chunks=chunks, **storage)
        for head in range(heads):
            array[0, head] = rng.standard_normal((tokens, DIM), dtype="f4").astype("f2")
    return folder


def upload(folder: Path, options: dict[str, Any], prefix: str) -> None:
    """Put all files of a folder into the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder)}"
            client_of(options).put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())


def run(inputs: Path | str, result: Path | str, **asked: Any) -> oocattn.Result:
    """A run of the same division wherever its inputs are."""
    given = {"queries": (0, 64), "chunks": 3, "decomposition": "cqs", "engine": "inline"}
    return oocattn.attention(inputs, result, **{**given, **asked})


class UnderWay:
    """A listener: the most requests that were under way at a time while subproblems were staged, and how many there were."""

    def __init__(self, store: SlowStore) -> None:
        self._store = store
        self.most = self.gets = 0

    def __call__(self, event: object) -> None:
        if isinstance(event, Started | Staged):
            seen = self._store.seen()
            if isinstance(event, Staged):
                self.most, self.gets = max(self.most, seen.most_at_a_time), self.gets + seen.gets


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, Any]]:
    """The storage options of an S3 server in a process of its own."""
    with serving_s3_apart() as options:
        yield options


@pytest.fixture
def slow(bucket: dict[str, Any]) -> Iterator[tuple[SlowStore, dict[str, Any]]]:
    """The same server, where each request waits, and the options with which it is reached so."""
    with slowing(bucket["endpoint_url"], LATENCY, UNLIMITED) as store:
        yield store, {**bucket, "endpoint_url": store.url}


@pytest.mark.parametrize("kind", STORED)
def test_chunks_in_s3_are_asked_for_together(
    tmp_path: Path, bucket: dict[str, Any], slow: tuple[SlowStore, dict[str, Any]], kind: str
) -> None:
    store, options = slow
    inputs = write_inputs(tmp_path / "qkv.zarr", **STORED[kind])
    upload(inputs, bucket, f"{kind}.zarr")
    expected = run(inputs, tmp_path / "expected.zarr")
    asked = {"storage_options": options, "callbacks": [under_way := UnderWay(store)]}
    found = run(f"s3://{BUCKET}/{kind}.zarr", tmp_path / "found.zarr", **asked)
    assert_same_bits(found, expected)
    assert found.report.bytes_read == expected.report.bytes_read
    # A subproblem needs up to 8 chunks of k and of v, two are read at a time. Zarr has 10 requests under way, in shards 1.
    assert under_way.most >= (6 if kind == "shards" else 20)
    assert under_way.gets <= (60 if kind == "shards" else 120)  # some chunks of k and v are read twice


def test_chunks_over_http_are_asked_for_together(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", **STORED["plain"])
    expected = run(inputs, tmp_path / "expected.zarr")
    with serving(tmp_path) as server, slowing(server.url, LATENCY, UNLIMITED) as store:
        found = run(f"{store.url}/qkv.zarr", tmp_path / "found.zarr", callbacks=[under_way := UnderWay(store)])
    assert under_way.most >= 20
    assert_same_bits(found, expected)


def test_a_result_is_sent_to_a_slow_store_by_several_threads(
    tmp_path: Path, bucket: dict[str, Any], slow: tuple[SlowStore, dict[str, Any]]
) -> None:
    _, options = slow
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=2**12, heads=8, **STORED["plain"])
    asked = {"causal": True, "window_size": (64, 0), "queries": None}
    expected = run(inputs, tmp_path / "expected.zarr", **asked)
    written: list[tuple[float, float]] = []

    def note(event: object) -> None:
        if isinstance(event, Written):
            written.extend((span.start, span.stop) for span in event.spans)

    stored = {"storage_options": options, "scratch": tmp_path / "scratch"}
    run(inputs, f"s3://{BUCKET}/slow-out.zarr", callbacks=[note], **stored, **asked)
    assert_same_bits(oocattn.open(f"s3://{BUCKET}/slow-out.zarr", storage_options=bucket), expected)
    assert len(written) == 24
    moments = [start for start, _ in written]
    assert max(sum(start <= at < stop for start, stop in written) for at in moments) >= 4
    assert min(stop - start for start, stop in written) < 2 * LATENCY  # out and lse do not wait for each other


def test_a_result_in_a_store_costs_few_requests(tmp_path: Path, bucket: dict[str, Any]) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=64, heads=1, chunk=64, **STORED["plain"])
    with slowing(bucket["endpoint_url"], 0.0, UNLIMITED) as store:
        options = {**bucket, "endpoint_url": store.url}
        run(inputs, f"s3://{BUCKET}/few.zarr", chunks=1, storage_options=options, scratch=tmp_path / "scratch")
        seen = store.seen()
    assert seen.gets + seen.puts + seen.others <= 70


def test_what_is_read_ahead_keeps_the_budget(
    tmp_path: Path, bucket: dict[str, Any], slow: tuple[SlowStore, dict[str, Any]]
) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", **STORED["plain"])
    upload(inputs, bucket, "budget.zarr")
    ample, scant = (
        oocattn.plan(f"s3://{BUCKET}/budget.zarr", host_memory=budget, storage_options=slow[1])
        for budget in ("4GiB", "96MiB")
    )
    assert ample.inputs.ahead >= 4 * scant.inputs.ahead
    assert ample.inputs.latency >= LATENCY
    assert ample.peak_host - ample.inputs.decode_bytes > 0
    assert scant.peak_host <= 96 << 20
    assert not oocattn.plan(inputs, host_memory="4GiB").inputs.ahead  # a local folder is read as before


@pytest.mark.parametrize(("budget", "ahead"), [("160MiB", True), ("64MiB", False)])
def test_a_small_budget_reads_ahead_while_there_is_room_for_it(
    tmp_path: Path, bucket: dict[str, Any], slow: tuple[SlowStore, dict[str, Any]], budget: str, ahead: bool
) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", **STORED["plain"])
    upload(inputs, bucket, "small.zarr")
    plan = oocattn.plan(f"s3://{BUCKET}/small.zarr", host_memory=budget, storage_options=slow[1])
    assert (plan.inputs.ahead > 0) is ahead
    assert ("are read ahead" in str(plan)) is ahead
    assert ("no room to read ahead" in str(plan)) is not ahead


def rate_of_a_plain_reader(store: SlowStore, options: dict[str, Any], prefix: str, number: int) -> float:
    """Bytes per second at which 16 threads of boto3 read the first so many objects, besides the first wait."""
    found = client_of(options).list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    keys = [each["Key"] for each in found if "/c/" in each["Key"]][:number]
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda key: client_of(options).get_object(Bucket=BUCKET, Key=key)["Body"].read(), keys)
        nbytes = sum(map(len, read))
    return nbytes / (time.monotonic() - began - store.latency)


@pytest.mark.slow
@pytest.mark.parametrize("to_store", [False, True])
@pytest.mark.parametrize("kind", ["plain", "shards"])
def test_a_run_takes_little_longer_than_its_bytes(tmp_path: Path, bucket: dict[str, Any], kind: str, to_store: bool) -> None:
    """An eighth of 200 MB/s, and chunks of an eighth of 2 MiB: two cores pass little more through S3 and Python.

    What cores that others use do not pass to a plain reader either is not the run's fault.
    """
    rate, tokens, storage = 25e6, 2**20, {**STORED[kind]}
    if kind == "shards":
        storage["shards"] = (1, 1, 2**16, DIM)
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=tokens, heads=4, chunk=2**12, **storage)
    upload(inputs, bucket, f"rate-{kind}.zarr")
    with slowing(bucket["endpoint_url"], LATENCY, rate) as store:
        options = {**bucket, "endpoint_url": store.url}
        asked: dict[str, Any] = {"causal": True, "window_size": (127, 0), "storage_options": options}
        result: Path | str = tmp_path / "out.zarr"
        if to_store:
            result, asked["scratch"] = f"s3://{BUCKET}/rate-out-{kind}.zarr", tmp_path / "scratch"
        sample = options, f"rate-{kind}.zarr", 8 if kind == "shards" else 128
        plain = [rate_of_a_plain_reader(store, *sample)]
        found = oocattn.attention(f"s3://{BUCKET}/rate-{kind}.zarr", result, **asked)
        plain.append(rate_of_a_plain_reader(store, *sample))
    report = found.report
    least = (report.bytes_read + to_store * report.bytes_written) / min(rate, sum(plain) / 2)
    print(f"{kind}: {report.seconds:.1f} s, planned {found.plan.seconds:.1f} s, bytes / rate {least:.1f} s, plain {plain}")
    assert report.seconds <= 1.15 * least
    assert found.plan.seconds == pytest.approx(report.seconds, rel=0.15)


def test_the_proxy_gives_its_rate_to_a_plain_reader(tmp_path: Path) -> None:
    """What the other tests measure against: without it, they would measure the proxy."""
    (tmp_path / "x").write_bytes(bytes(1 << 19))
    with serving(tmp_path) as server, slowing(server.url, LATENCY, 10e6) as store:

        def get(_: int) -> int:
            with urllib.request.urlopen(f"{store.url}/x") as answer:
                return len(answer.read())

        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            nbytes = sum(pool.map(get, range(20)))
        seconds = time.monotonic() - began
        seen = store.seen()
    assert nbytes == seen.sent == 20 << 19
    assert (seen.gets, seen.most_at_a_time) == (20, 8)
    assert nbytes / 10e6 <= seconds + 0.05
    assert seconds <= 1.5 * nbytes / 10e6


@pytest.mark.parametrize("rows", [100, 2**13])  # parts of a shard, and a whole one
def test_damage_in_a_shard_of_a_server_is_found(tmp_path: Path, rows: int) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=2**13, heads=1, shards=(1, 1, 2**13, DIM), compressors=None)
    shard = inputs / "k" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[-4 - 16 * 4 : -4 - 16 * 3] = b"\xff" * 16  # the first chunk of its index
    with serving(tmp_path) as server:
        source = Dataset.open(f"{server.url}/qkv.zarr").arrays["k"]
        shard.write_bytes(content)
        out = np.empty((rows, DIM), source.dtype)
        with pytest.raises(oocattn.IntegrityError, match="missing"):
            source.read_rows(0, 0, 0, rows, out)


def test_a_shard_that_is_read_as_a_whole_is_one_request_and_its_index_is_kept(tmp_path: Path) -> None:
    write_inputs(tmp_path / "qkv.zarr", tokens=2**13, heads=1, shards=(1, 1, 2**13, DIM), compressors=None)
    with serving(tmp_path) as server:
        source = Dataset.open(f"{server.url}/qkv.zarr").arrays["k"]
        server.requests.clear()
        for rows in (2**13, 100):
            source.read_rows(0, 0, 0, rows, np.empty((rows, DIM), source.dtype))
    assert server.requests == 2 * [("GET", "/qkv.zarr/k/c/0/0/0/0")]


def test_a_dataset_in_a_slow_store_is_looked_at_again_by_few_requests_after_one_another(
    tmp_path: Path, bucket: dict[str, Any]
) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=2**13, **{**STORED["shards"], "shards": (1, 1, 2**12, DIM)})
    upload(inputs, bucket, "again.zarr")
    latency, seconds = 5 * LATENCY, []
    with slowing(bucket["endpoint_url"], latency, UNLIMITED) as store:
        options = {**bucket, "endpoint_url": store.url}
        dataset = Dataset.open(f"s3://{BUCKET}/again.zarr", storage_options=options)
        before = dataset.as_found.within_run
        for _ in range(3):
            began = time.monotonic()
            assert dataset.fingerprint_again() == before
            seconds.append(time.monotonic() - began)
        assert dataset.reopen().fingerprint(within_run=True) == before
    assert min(seconds) < 3.5 * latency  # the group, then its arrays; meanwhile what is listed, and samples


def test_a_change_of_metadata_or_chunks_in_a_store_is_found(tmp_path: Path, bucket: dict[str, Any]) -> None:
    inputs = write_inputs(tmp_path / "qkv.zarr", tokens=2**12, **STORED["plain"])
    upload(inputs, bucket, "changed.zarr")
    dataset = Dataset.open(f"s3://{BUCKET}/changed.zarr", storage_options=bucket)
    before = dataset.as_found.within_run
    assert dataset.fingerprint_again() == before
    chunk = (inputs / "k" / "c" / "0" / "1" / "1" / "0").read_bytes()
    put = client_of(bucket).put_object
    put(Bucket=BUCKET, Key="changed.zarr/k/c/0/1/1/0", Body=chunk[::-1])
    assert changed_arrays(before, dataset.fingerprint_again()) == "k"
    put(Bucket=BUCKET, Key="changed.zarr/k/c/0/1/1/0", Body=chunk)
    assert dataset.fingerprint_again() == before
    other = (inputs / "v" / "zarr.json").read_text().replace("little", "big")
    put(Bucket=BUCKET, Key="changed.zarr/v/zarr.json", Body=other.encode())
    assert changed_arrays(before, dataset.fingerprint_again()) == "v"


def test_a_plan_measures_the_rate_of_a_store(tmp_path: Path, bucket: dict[str, Any]) -> None:
    upload(write_inputs(tmp_path / "qkv.zarr", **STORED["shards"]), bucket, "measured.zarr")
    with slowing(bucket["endpoint_url"], LATENCY, 4e6) as store:
        options = {**bucket, "endpoint_url": store.url}
        plan = oocattn.plan(f"s3://{BUCKET}/measured.zarr", storage_options=options)
    assert plan.inputs.decode_rate == pytest.approx(4e6, rel=0.2)


def test_what_a_plan_says_of_reading_ahead_is_json(
    tmp_path: Path, bucket: dict[str, Any], slow: tuple[SlowStore, dict[str, Any]]
) -> None:
    upload(write_inputs(tmp_path / "qkv.zarr", tokens=2**12, **STORED["plain"]), bucket, "json.zarr")
    plan = oocattn.plan(f"s3://{BUCKET}/json.zarr", storage_options=slow[1])
    inputs = json.loads(json.dumps(plan.to_json()))["inputs"]
    assert inputs["ahead"] == plan.inputs.ahead > 0
    assert "are read ahead" in str(plan)
