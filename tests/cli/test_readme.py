"""Every example of the README and of docs/ runs as written, page by page; links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from oocattn.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_commands_and_examples_of_the_readme_and_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    ran = 0
    for language, block in re.findall(
        r"^```(console|python)\n(.*?)^```$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE | re.DOTALL
    ):
        if language == "python":
            exec(block, namespace)
            ran += 1
        for command in re.findall(r"^\$ oocattn (?!doctor)(.*)$", block, re.MULTILINE):  # doctor has tests of its own
            assert cli.main(shlex.split(command)) == 0, command
            ran += 1
    assert ran >= 9
    assert capsys.readouterr().out.count("passed") == 1


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", found.lower()).replace(" ", "-") for found in headings]


def test_contributing_names_every_module_of_the_package():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.name for path in (ROOT / "oocattn").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {module for module in modules if f"`{module}`" not in table and f"/{module}`" not in table}
