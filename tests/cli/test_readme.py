"""The README and docs/: every command and example runs as written, and what they list is what there is."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oocattn
from oocattn.cli import main as cli
from oocattn.cli.options import make_parser
from oocattn.naming import on_command_line
from oocattn.storage.files.durable import decode_record, read_record

ROOT = Path(__file__).parents[2]
README, DOCS, CONTRIBUTING = ROOT / "README.md", ROOT / "docs", ROOT / "CONTRIBUTING.md"
PAGES = [README, *(ROOT / page for page in re.findall(r"^\| \[.*\]\((docs/[\w-]+\.md)\)", README.read_text(), re.MULTILINE))]
"""The README and the pages of its table, in reading order: an example may use what an earlier page has made."""

OTHERS = [CONTRIBUTING, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]

NOT_RUN = ("pip install ", "make demo", "oocattn doctor")
"""Commands that install, that take minutes, or that have tests of their own."""

AVOIDED = r"\b(anew|for ever|in spite of|tells? of|is succeeded|what it is at|goes on with|is mended)\b"
"""Archaisms and turns of phrase."""


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str, int]]:
    """The language, text and first line of every fenced block of a page in one of these languages."""
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if not languages or found[1] in languages:
            yield found[1], found[2], text.count("\n", 0, found.start(2)) + 1


def test_every_command_and_example_of_the_readme_and_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for page in PAGES:
        for language, block, line in blocks(page, "console", "python"):
            place = f"{page.name}:{line}"
            if language == "python":  # with empty lines before it, so that a traceback names the line of the page
                exec(compile("\n" * (line - 1) + block, page, "exec"), namespace)
                continue
            for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
                if not command.startswith(NOT_RUN):
                    command, *piped = command.split(" | ", 1)
                    program, *options = shlex.split(command)
                    assert program == "oocattn", f"{place}: {command}: say how it is tested"
                    printed += capsys.readouterr().out
                    assert cli.main(options) == 0, f"{place}: {command}"
                    if piped and shutil.which(shlex.split(piped[0])[0]):
                        subprocess.run(shlex.split(piped[0]), input=capsys.readouterr().out, text=True, check=True)
    printed += capsys.readouterr().out
    verified = re.findall("^passed", printed, re.MULTILINE)
    assert len(verified) == 4  # README, docs/command-line.md, and docs/certificates.md twice verify a result
    assert printed.count("interrupted: ") == 2  # docs/interruptions.md


def test_every_page_of_docs_is_in_the_table_of_the_readme():
    assert set(PAGES) == {README, *DOCS.glob("*.md")}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", found.lower()).replace(" ", "-") for found in headings]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_a_page_avoids_archaisms(page):
    assert not re.findall(AVOIDED, page.read_text())


def test_the_plan_that_is_explained_looks_like_a_real_one(tmp_path):
    """Line by line but for numbers, units and what binds, which are the machine's."""
    shown, *_ = [text for _, text, _ in blocks(DOCS / "plans.md", "text")]
    dataset = tmp_path / "qkv.zarr"
    oocattn.synthesise(dataset, tokens=16384, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16")
    plan = oocattn.plan(dataset, causal=True, host_memory="48MiB", chunks=7, decomposition="cqs")
    numbers = r"[\d.,]+(e-?\d+)?( ?(m|µ)?s\b| ?[KMGT]?i?(B|FLOP)\b| min\b)?|  <- binds| +"
    with on_command_line():
        expected = re.sub(numbers, " ", f"{plan}\ndrawn in plan.svg\n")
    assert re.sub(numbers, " ", shown) == expected


OF_DATA = ("versions", "busy", "digests", "hardware", "log")  # names in them, or how many there are, differ from run to run


def shape_of(value: Any) -> Any:
    """The names in a JSON value, at all depths; names that are data themselves are left out."""
    if isinstance(value, dict):
        return {name: shape_of(inner) for name, inner in value.items() if name not in OF_DATA}
    if isinstance(value, list):  # of numbers there may be none
        return [shape_of(inner) for inner in value[:1] if isinstance(inner, dict | list)]
    return None


def test_file_formats_name_every_field_of_the_files(tmp_path, monkeypatch):
    text = (DOCS / "file-formats.md").read_text()
    sections = dict(re.findall(r"^### `([^`]*)`\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL))
    shown = {
        name: json.loads(block)
        for name, section in sections.items()
        for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    }
    dataset, result = tmp_path / "qkv.zarr", tmp_path / "out.zarr"
    state = result.with_name("out.zarr.oocattn")
    oocattn.synthesise(dataset, tokens=64, heads=2, kv_heads=1, head_dim=8, dtype="float32")

    def stop(event: oocattn.Event) -> None:
        if isinstance(event, oocattn.Written):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oocattn.attention(dataset, result, causal=True, chunks=7, callbacks=[stop])
    partial = next((state / "partials").iterdir())
    found = {
        "plan.json": read_record(state / "plan.json"),
        "finished/HEADGROUP-CHUNK.json": read_record(next((state / "finished").iterdir())),
        "partials/partial-HEADGROUP-CHUNK-SUBPROBLEM": decode_record(partial.read_bytes().splitlines()[0], partial),
        "status.json": json.loads((state / "status.json").read_text()),
    }
    oocattn.resume(result)
    found["RESULT/zarr.json"] = json.loads((result / "zarr.json").read_text())["attributes"]["oocattn"]
    found["RESULT/out/zarr.json"] = json.loads((result / "out" / "zarr.json").read_text())["attributes"]["checksums"]
    found |= {name: json.loads((state / name).read_text()) for name in ("report.json", "attempts.json")}
    assert shown.keys() == found.keys()
    for name, content in found.items():
        assert shape_of(shown[name]) == shape_of(content), name
    written = found["plan.json"]["format"]
    assert shown["plan.json"]["format"] == written
    assert f"`format` is {written}." in sections["plan.json"]


def test_command_line_names_every_command_and_option():
    page = (DOCS / "command-line.md").read_text()
    (commands,) = [
        action.choices for action in make_parser(cli._COMMANDS)._actions if isinstance(action, argparse._SubParsersAction)
    ]
    names = {name for name in commands if f"| `{name}" not in page}
    for command in commands.values():
        names |= {option for action in command._actions for option in action.option_strings if f"{option}" not in page}
    assert not names - {"-h"}


def test_python_names_every_function_event_and_error():
    page = (DOCS / "python.md").read_text()
    assert not [name for name in oocattn.__all__ if name not in page and name not in ("BFloat16", "__version__")]


def test_contributing_names_every_room_and_files_that_exist():
    text = CONTRIBUTING.read_text()
    rooms = {path.parent.name for path in (ROOT / "oocattn").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "oocattn").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {room for room in rooms if f"`{room}/`" not in text}
    assert not {module for module in modules if f"`{module}`" not in text}
    places = itertools.chain(ROOT.glob("*.md"), *((ROOT / folder).rglob("*.*") for folder in ("oocattn", "tests", "docs")))
    files = [f"/{path.relative_to(ROOT)}" for path in places]
    named = {name for name in re.findall(r"`([\w/-]+\.(?:py|md|cu|cuh))`", text) if "NAME" not in name}
    assert len(named) > 50
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in files)]
