"""Rooms of the package: imports point one way, modules and functions stay short, each room says what belongs in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE, TESTS = Path(__file__).parents[1] / "oocattn", Path(__file__).parent
ROOT, API = "root", "api"
EVERY_ROOM = {"api", "pipelines", "operations", "storage", "kernels", "planning", "division", "problem", "verification"}

MAY_IMPORT: dict[str, set[str]] = {
    "problem": set(),
    "division": {"problem"},
    "planning": {"division", "problem"},
    "kernels": {"problem"},
    "storage": {"problem"},
    "operations": {"kernels", "planning", "division", "problem"},
    "pipelines": {"operations", "storage", "kernels", "planning", "division", "problem"},
    "verification": {"storage", "problem"},
    "root": {"problem"},
    "api": EVERY_ROOM,
    "nn": EVERY_ROOM,
    "integrations": EVERY_ROOM | {"nn"},
    "bench": EVERY_ROOM,
    "drawing": {"storage"},
    "cli": EVERY_ROOM | {"bench", "drawing"},
}
"""Of each room, the rooms beside itself that it may import. Every room may import the small modules at the root."""

EXCEPTIONS = {
    "planning/measure.py": {"kernels", "storage"},  # planning has effects in the four modules that measure
    "planning/kernel_rates.py": {"kernels"},
    "planning/ahead.py": {"kernels"},  # what the registry knows of kernels without PyTorch
    "planning/host.py": {"storage"},
    "planning/reading.py": {"storage"},
    "planning/plan.py": {"storage"},  # and writes a drawing to a file
    "pipelines/survey.py": {"drawing"},  # likewise
    "imports.py": {"storage"},  # registers a dtype when Zarr is imported
}

API_FILES = {"api.py", "afterwards.py"}

ENTRANCES = {"__init__.py", "__main__.py"}
"""Modules at the root that may import everything."""

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TEST_FILES = {path.relative_to(TESTS).as_posix(): path for path in sorted(TESTS.rglob("*.py"))}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 50


def module_of(name: str) -> str | None:
    """The file of the module or package of that dotted name; None where it is neither."""
    package, *inside = name.split(".")
    if package != "oocattn":
        return None
    place = "/".join(inside)
    return next((file for file in (f"{place}.py", f"{place}/__init__.py".lstrip("/")) if file in FILES), None)


def imports_of(file: str, everything: bool = True) -> Iterator[str]:
    """The files of this package that a file imports: lazily, for types, or by a string, too, if `everything`."""
    tree = ast.parse(FILES[file].read_text())
    for node in ast.walk(tree) if everything else tree.body:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import: name the module in full"
            inside = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if module_of(name) else name.rpartition(".")[0] for name in inside]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if "." in node.value else []  # "oocattn" alone is the name of the logger
        yield from filter(None, map(module_of, names))


def room_of(file: str) -> str:
    """The room that a file is in; the api is a room of its own, and so is the package's face, which gives the api."""
    room, _, inside = file.partition("/")
    return room if inside else API if file in API_FILES | ENTRANCES else ROOT


def test_imports_between_rooms_point_one_way() -> None:
    found = {(file, imported) for file in FILES if file not in ENTRANCES for imported in imports_of(file)}
    wrong = [
        f"{file} imports {imported}"
        for file, imported in sorted(found)
        if room_of(imported) not in MAY_IMPORT[room_of(file)] | EXCEPTIONS.get(file, set()) | {room_of(file), ROOT}
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """At import; `TopologicalSorter` raises CycleError with the modules of the circle."""
    TopologicalSorter({file: set(imports_of(file, everything=False)) - {file} for file in FILES}).prepare()


def test_every_folder_of_the_package_says_in_one_sentence_what_belongs_there() -> None:
    for file, path in FILES.items():
        if path.name == "__init__.py":
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert re.fullmatch(r"[A-Z`][^\n]*\.", said), f"{file} must begin with one sentence on one line"
            assert ". " not in said, f"{file} says more than one sentence"
    assert not [path for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize("files", [FILES, TEST_FILES], ids=["package", "tests"])
def test_modules_have_at_most_350_lines(files: dict[str, Path]) -> None:
    lengths = {file: len(path.read_text().splitlines()) for file, path in files.items()}
    too_long = [f"{file}: {lines} lines" for file, lines in lengths.items() if lines > MOST_LINES]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("files", [FILES, TEST_FILES], ids=["package", "tests"])
def test_functions_have_at_most_50_lines(files: dict[str, Path]) -> None:
    too_long = [
        f"{file}:{node.lineno} {node.name}: {lines} lines"
        for file, path in files.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]
    assert not too_long, "\n".join(too_long)
