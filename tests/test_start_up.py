"""Commands that compute nothing import nothing heavy, and the package's names are there all the same."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from distributed import Client
from support import carry_out, plan_for, write_dataset
from test_resuming import interrupted

import oocattn

HEAVY = ("torch", "zarr", "dask", "distributed", "numcodecs", "fsspec", "asyncio")

MAIN = """
import json, sys
from oocattn.__main__ import run
try:
    code = run()
except SystemExit as ended:
    code = ended.code
print()
print(json.dumps([code, sorted(sys.modules)]))
"""


def run_command(*arguments: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the modules that its process had imported in the end."""
    ended = subprocess.run([sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True, check=True)
    code, modules = json.loads(ended.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["--version"], 0),
        (["run"], 2),
        (["plan", "data.zarr", "--host-memory", "many"], 2),
        (["plan", "data.zarr", "--dtype", "float64"], 2),
        (["status", "nothing.zarr"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_command_that_computes_nothing_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    found, modules = run_command(*arguments)
    assert found == code
    assert not modules.intersection(HEAVY)


def test_the_status_of_runs_and_results_is_read_without_heavy_imports(
    client: Client, dataset: Path, fast_path: Path
) -> None:
    finished, unfinished = fast_path / "finished.zarr", fast_path / "unfinished.zarr"
    carry_out(plan_for(dataset), dataset, finished, client)
    oocattn.verify(finished, rows=4)
    interrupted(plan_for(dataset, chunks=13), dataset, unfinished, client=client)
    for result in (finished, unfinished):
        code, modules = run_command("status", str(result))
        assert code == 0
        assert not modules.intersection(HEAVY), result


def test_every_public_name_is_there_by_every_way() -> None:
    tree = ast.parse(Path(oocattn.__file__).read_text())
    for_types = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {name.asname: node.module for node in for_types.body for name in node.names}
    assert typed == {name: module for module, names in oocattn._MODULES.items() for name in names}
    assert set(oocattn.__all__) == {*typed, "__version__"}
    assert set(oocattn.__all__) <= set(dir(oocattn))
    everything: dict[str, object] = {}
    exec("from oocattn import *", everything)
    assert set(oocattn.__all__) <= everything.keys()
    for name in typed:
        assert getattr(oocattn, name) is everything[name]
    assert pickle.loads(pickle.dumps(oocattn.attention)) is oocattn.attention
    with pytest.raises(AttributeError, match="'oocattn' has no attribute 'nothing'"):
        oocattn.nothing  # noqa: B018


def test_names_are_imported_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that import numpy at once may find it half there: its modules import each other."""
    package = tmp_path / "lazy"
    package.mkdir()
    modules = {"lazy.one": ["one"], "lazy.two": ["two"]}
    names = f"from oocattn.imports import lazy_attributes\n__getattr__, __dir__ = lazy_attributes(__name__, {modules})\n"
    package.joinpath("__init__.py").write_text(f"{names}steps = []")
    for name in ("one", "two"):
        lines = "import lazy, time", "lazy.steps += ['begin']", "time.sleep(0.1)", "lazy.steps += ['end']", f"{name} = 1"
        package.joinpath(f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    lazy = importlib.import_module("lazy")
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda name: getattr(lazy, name), ("one", "two"))) == [1, 1]
    assert lazy.steps == ["begin", "end", "begin", "end"]


@pytest.mark.parametrize(
    "imports",
    [
        "import zarr, oocattn",
        "import oocattn, zarr",
        "import oocattn; oocattn.import_arrays",
        "import oocattn, importlib.util; importlib.util.find_spec('zarr')",  # as xarray asks whether it is installed
    ],
)
def test_plain_zarr_reads_bfloat16_whatever_is_imported_first(tmp_path: Path, imports: str) -> None:
    values = np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(1, 1, 4, 2)
    array = write_dataset(tmp_path / "data.zarr", (values, values, values)) / "q"
    script = f"{imports}; import zarr; print(zarr.open_array({str(array)!r}, mode='r').dtype)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "bfloat16"
