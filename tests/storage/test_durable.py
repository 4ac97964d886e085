"""What is made durably is on disk down from the first folder that was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from oocattn.storage.durable import make_durably


def test_every_folder_that_gets_an_entry_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("oocattn.storage.durable.sync", synced.append)
    make_durably(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    make_durably(tmp_path / "a" / "b" / "c")
    assert synced == []
