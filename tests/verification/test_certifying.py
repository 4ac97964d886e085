"""`verify` against results that were corrupted: checksums find everything, rows what lies in the sample."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import BESIDE, carry_out, damage, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Certificate, IntegrityError
from oocattn.cli.main import main
from oocattn.storage.files.durable import read_json
from oocattn.storage.paths import ResultPaths
from oocattn.verification import certify as certifying

TOKENS, CHUNKS, HEADS = 210, 7, 4
PART = TOKENS // CHUNKS
PARTS = HEADS * CHUNKS


def finish(folder: Path, seed: int = 0) -> Path:
    arrays = normal_arrays(TOKENS, heads=HEADS, kv_heads=2, dtype="float16", seed=seed)
    dataset = write_dataset(folder / "dataset.zarr", arrays, 50)
    carry_out(plan_for(dataset, causal=True, chunks=CHUNKS), dataset, folder / "result.zarr")
    return folder / "result.zarr"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of another dataset of the same shape."""
    return finish(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def result(right: Path, fast_path: Path) -> Path:
    """A copy of the right result, to be spoilt; without the folder beside it."""
    return Path(shutil.copytree(right, fast_path / "result.zarr"))


def chunk(result: Path, head: int, part: int, name: str = "out") -> Path:
    key = f"c.0.{head}.{part}" + (".0" if name == "out" else "")
    assert (result / name / key).is_file()
    return result / name / key


def sampled(certificate: Certificate, head: int, part: int) -> bool:
    return any((row.head, row.token // PART) == (head, part) for row in certificate.rows)


def damaged(certificate: Certificate) -> set[tuple[str, int, int]]:
    """Array, head and part of what is damaged."""
    assert all(of.start % PART == 0 and of.stop == of.start + PART and of.batch == 0 for of in certificate.damaged)
    return {(of.array, of.head, of.start // PART) for of in certificate.damaged}


def test_a_right_result_is_certified(result: Path) -> None:
    certificate = oocattn.verify(result)
    assert certificate.passed
    assert [(array.name, array.state, array.parts) for array in certificate.arrays] == [
        ("out", "checked", PARTS),
        ("lse", "checked", PARTS),
    ]
    assert re.fullmatch("[0-9a-f]{64}", str(certificate.digest))
    assert certificate.dataset_unchanged
    assert certificate.computed_with.items() >= certificate.verified_with.items()
    all_rows = certificate.strata[-1]
    assert (all_rows.rows, all_rows.wrong) == (len(certificate.rows), 0)
    assert 0.1 < all_rows.mean_ulps < 0.3
    assert 0.4 < all_rows.ulps < 3


@pytest.mark.parametrize("name", ["out", "lse"])
def test_any_flipped_bit_is_found_and_named(result: Path, name: str) -> None:
    chance = random.Random(0)
    for _ in range(12):
        head, part = chance.randrange(HEADS), chance.randrange(CHUNKS)
        file = chunk(result, head, part, name)
        before = file.read_bytes()
        place, bit = chance.randrange(len(before)), 1 << chance.randrange(8)
        damage(file, lambda content, at=place, by=bit: content[:at] + bytes([content[at] ^ by]) + content[at + 1 :])
        certificate = oocattn.verify(result, rows=1, seed=chance.randrange(1000))
        assert not certificate.passed
        assert damaged(certificate) == {(name, head, part)}
        words = f"{name}, batch 0, head {head}, tokens {part * PART} to {part * PART + PART - 1}: checksum "
        assert words in str(certificate)
        assert f"1 of {2 * PARTS} parts are not as they were written" in certificate.verdict
        damage(file, lambda content, before=before: before)
    assert oocattn.verify(result, rows=1).passed


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_sign_is_seen_by_rows_exactly_where_it_is_sampled(result: Path, seed: int) -> None:
    head, token = seed % HEADS, 17 * seed % TOKENS
    file, row = chunk(result, head, token // PART), token % PART

    def flip(content: bytes) -> bytes:
        out = np.frombuffer(content, np.uint16).reshape(PART, -1).copy()
        out[row, np.abs(out[row].view(np.float16)).argmax()] ^= 0x8000
        return out.tobytes()

    damage(file, flip)
    certificate = oocattn.verify(result, rows=200, seed=seed, checksums=False)
    assert certificate.passed == all((of.head, of.token) != (head, token) for of in certificate.rows)
    assert [(of.head, of.token) for of in certificate.wrong] in ([], [(head, token)])
    assert not certificate.damaged
    assert not oocattn.verify(result, rows=1, seed=seed).passed


def swap(result: Path, other: Path) -> set[tuple[int, int]]:
    """Two chunks of one head, one for the other."""
    first, second = chunk(result, 2, 1), chunk(result, 2, 5)
    contents = first.read_bytes(), second.read_bytes()
    damage(first, lambda _: contents[1])
    damage(second, lambda _: contents[0])
    return {(2, 1), (2, 5)}


def take_from_other(result: Path, other: Path) -> set[tuple[int, int]]:
    damage(chunk(result, 1, 3), lambda _: chunk(other, 1, 3).read_bytes())
    return {(1, 3)}


def remove(result: Path, other: Path) -> set[tuple[int, int]]:
    damage(chunk(result, 0, 4), lambda _: None)
    return {(0, 4)}


def cut_short(result: Path, other: Path) -> set[tuple[int, int]]:
    damage(chunk(result, 3, 6), lambda content: content[:-2])
    return {(3, 6)}


@pytest.mark.parametrize("corrupt", [swap, take_from_other, remove, cut_short])
def test_every_damage_of_a_chunk_is_found(
    result: Path, other: Path, corrupt: Callable[[Path, Path], set[tuple[int, int]]]
) -> None:
    """Checksums name it, always; rows fail exactly where one of the sample lies in it."""
    places = corrupt(result, other)
    certificate = oocattn.verify(result, rows=1)
    assert not certificate.passed
    assert damaged(certificate) == {("out", *place) for place in places}
    outcomes = set()
    for seed in range(24):
        certificate = oocattn.verify(result, rows=6, seed=seed, checksums=False)
        seen = any(sampled(certificate, *place) for place in places)
        assert certificate.passed != seen
        assert {(row.head, row.token // PART) for row in certificate.wrong} <= places
        outcomes.add(seen)
        assert ("95% confidence" in certificate.statement) != seen
    assert outcomes == {True, False}


def test_a_row_that_cannot_be_read_is_wrong_even_where_it_should_be_nan(tmp_path: Path) -> None:
    q, k, v = normal_arrays(TOKENS)
    v[:] = np.nan
    dataset = write_dataset(tmp_path / "dataset.zarr", (q, k, v))
    carry_out(plan_for(dataset, chunks=CHUNKS), dataset, tmp_path / "result.zarr")
    assert oocattn.verify(tmp_path / "result.zarr").passed
    chunk(tmp_path / "result.zarr", 0, 0).unlink()
    certificate = oocattn.verify(tmp_path / "result.zarr", checksums=False)
    assert {(row.head, row.token // PART) for row in certificate.wrong} == {(0, 0)}
    assert certificate.ledger is not None
    assert certificate.ledger.not_finite == v.size


def test_without_checksums_none_are_claimed(result: Path) -> None:
    digest = oocattn.verify(result).digest
    certificate = oocattn.verify(result, checksums=False)
    assert certificate.passed
    assert [array.state for array in certificate.arrays] == ["not checked", "not checked"]
    assert "out: 28 parts, not compared, as was asked" in str(certificate)
    assert certificate.digest == digest
    assert "--no-checksums" in certificate.again
    del zarr.open_group(result, mode="r+")["out"].attrs["checksums"]
    certificate = oocattn.verify(result)
    assert certificate.passed
    assert [array.state for array in certificate.arrays] == ["not recorded", "checked"]
    assert "out: none are recorded, so nothing is known of the rows that were not recomputed" in str(certificate)
    assert certificate.digest is None
    assert "digest" not in str(certificate)


def test_checksums_that_are_no_checksums_are_refused(result: Path) -> None:
    zarr.open_group(result, mode="r+")["lse"].attrs["checksums"] = {"algorithm": "crc32", "rows": PART, "digits": "0"}
    with pytest.raises(IntegrityError, match="is not the checksums of an array"):
        oocattn.verify(result)


@pytest.mark.parametrize(
    "storage",
    [
        {"chunks": (1, 2, 64, 8), "compressors": "auto"},
        {"chunks": (1, 1, 21, 4), "compressors": None},
        {"chunks": (1, 1, 30, 8), "shards": (1, 2, 90, 8)},
    ],
)
def test_a_result_that_plain_zarr_stored_anew_still_verifies(result: Path, tmp_path: Path, storage: dict[str, Any]) -> None:
    old, new = zarr.open_group(result, mode="r"), zarr.open_group(tmp_path / "new.zarr", mode="w")
    new.attrs.update(old.attrs)
    for name in ("out", "lse"):
        rank = old[name].ndim
        chosen = {key: value[:rank] if isinstance(value, tuple) else value for key, value in storage.items()}
        new.create_array(name, data=old[name][...], **chosen).attrs.update(old[name].attrs)
    certificate = oocattn.verify(tmp_path / "new.zarr")
    assert certificate.passed, certificate
    assert certificate.digest == oocattn.verify(result).digest
    changed = new["out"][0, 1, 100, 3] + np.float16(1)
    new["out"][0, 1, 100, 3] = changed
    assert damaged(oocattn.verify(tmp_path / "new.zarr", rows=1)) == {("out", 1, 3)}


def test_arrays_of_another_shape_are_refused(result: Path) -> None:
    group = zarr.open_group(result, mode="r+")
    del group["lse"]
    group.create_array("lse", shape=(1, HEADS, TOKENS + 1), dtype="f4")
    with pytest.raises(IntegrityError, match=r"'lse' of .* is float32 \[1, 4, 211\]: expected float32 \[1, 4, 210\]"):
        oocattn.verify(result)


# Files


def test_a_certificate_is_kept_beside_the_result(right: Path, result: Path) -> None:
    assert oocattn.verify(result).ledger is None
    assert "ledger       not available" in str(oocattn.verify(result))
    shutil.copy(ResultPaths.at(right).report, ResultPaths.at(result).report)
    certificate = oocattn.verify(result)
    paths = ResultPaths.at(result)
    assert certificate.files == (str(paths.certificate_page), str(paths.certificate))
    assert Certificate.from_json(read_json(paths.certificate)) == certificate
    assert certificate.verdict in paths.certificate_page.read_text()
    assert certificate.ledger is not None
    assert certificate.ledger.counted == certificate.ledger.expected == HEADS * TOKENS * (TOKENS + 1) // 2
    assert {path.name for path in paths.state.iterdir()} == {"report.json", "certificate.json", "certificate.html"}
    assert oocattn.status(result).state == "finished"


def test_a_report_of_another_run_does_not_pass_for_its_own(
    right: Path, result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = ResultPaths.at(result).report
    path.parent.mkdir()
    path.write_text(ResultPaths.at(right).report.read_text().replace('"pairs": 88620', '"pairs": 88621'))
    certificate = oocattn.verify(result)
    assert certificate.ledger is not None
    assert certificate.ledger.counted == 88_621
    assert certificate.verdict == "passed, but the report beside the result is not that of its run"
    assert "88,621 pairs counted, 88,620 expected: the report beside the result is NOT that of its run" in str(certificate)
    path.write_text(path.read_text().replace('"pairs": 88621', '"pairs": "all"'))
    assert oocattn.verify(result).ledger is None
    assert "not the report of a run: pairs" in caplog.text


def test_a_result_that_is_replaced_while_it_is_verified_gets_no_certificate(
    right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, result = right.with_name("dataset.zarr"), tmp_path / "result.zarr"
    carry_out(plan_for(dataset, chunks=7), dataset, result)
    real = certifying.recompute_rows

    def late(*arguments: Any, **options: Any) -> Any:
        carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result, overwrite=True)
        return real(*arguments, **options)

    monkeypatch.setattr(certifying, "recompute_rows", late)
    with pytest.raises(IntegrityError, match="was replaced while it was verified"):
        oocattn.verify(result)
    assert not ResultPaths.at(result).certificate.exists()


def test_a_run_keeps_the_certificate_of_its_result_and_removes_that_of_another(right: Path, tmp_path: Path) -> None:
    dataset, result = right.with_name("dataset.zarr"), tmp_path / "result.zarr"
    plan, causal = plan_for(dataset, chunks=7), plan_for(dataset, chunks=7, causal=True)
    carry_out(plan, dataset, result)
    oocattn.verify(result)
    carry_out(plan, dataset, result)  # is there already
    state, certificate = ResultPaths.at(result).state, ResultPaths.at(result).certificate
    assert {path.name for path in state.iterdir()} == {*BESIDE, "certificate.json", "certificate.html"}

    def verify_meanwhile(event: oocattn.Event) -> None:
        if event.kind == "merged":
            assert oocattn.verify(result, rows=1).passed

    there: dict[str, bool] = {}

    def look(event: oocattn.Event) -> None:
        there[event.kind] = read_json(certificate) is not None

    carry_out(causal, dataset, result, overwrite=True, callbacks=[look])
    assert (there["started"], there["written"], there["committed"]) == (True, True, False)  # as its result is
    assert {path.name for path in state.iterdir()} == BESIDE
    carry_out(plan, dataset, result, overwrite=True, callbacks=[verify_meanwhile])
    assert {path.name for path in state.iterdir()} == BESIDE


def test_a_certificate_that_cannot_be_written_is_returned_all_the_same(
    result: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ResultPaths.at(result).certificate_page.mkdir(parents=True)  # root may write anywhere, but not over a folder
    certificate = oocattn.verify(result)
    assert re.search(r"the certificate was not written: .*certificate\.html", caplog.text)
    assert certificate.passed
    assert certificate.files == ()


def test_the_command_prints_it_and_says_where_it_is(
    result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["verify", str(result), "--rows", "20", "--seed", "4", "--host-memory", "64MiB"]) == 0
    printed = capsys.readouterr().out
    paths = ResultPaths.at(result)
    assert printed.startswith(f"certificate  {paths.certificate_page}, {paths.certificate}\n")
    assert printed.endswith("passed\n")
    certificate = Certificate.from_json(read_json(paths.certificate))
    assert (certificate.asked, certificate.seed) == (20, 4)
    os.truncate(chunk(result, 1, 1, "lse"), 4)
    assert main(["verify", str(result), "--rows", "1", "--no-checksums"]) == 0
    assert main(["verify", str(result), "--rows", "1"]) == 1
    assert "lse, batch 0, head 1, tokens 30 to 59: " in capsys.readouterr().out
    assert main(["verify", str(result), "--host-memory", "1KiB"]) == 1
    assert "the smallest that works is" in capsys.readouterr().err


def test_the_command_on_a_certificate_makes_it_again(result: Path) -> None:
    first = oocattn.verify(result, rows=37, seed=9, checksums=False)
    assert main(first.again.split()[1:]) == 0
    assert Certificate.from_json(read_json(ResultPaths.at(result).certificate)) == first
