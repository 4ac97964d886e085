"""A small dataset for commands, made by one."""

import pytest
from small import SMALL

from oocattn.cli import main as cli


@pytest.fixture
def dataset(tmp_path):
    path = str(tmp_path / "qkv.zarr")
    assert cli.main(["synth", path, *SMALL]) == 0
    return path


@pytest.fixture
def result(tmp_path):
    return str(tmp_path / "out.zarr")
