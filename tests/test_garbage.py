"""Garbage collection is paused during imports, and afterwards as it was before."""

from __future__ import annotations

import gc
import importlib

import pytest

from oocattn.imports import collection_paused


def import_what_is_not_there() -> None:
    assert not gc.isenabled()
    importlib.import_module("oocattn.not_there")


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_also_after_an_import_that_fails(enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), collection_paused():
            import_what_is_not_there()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
