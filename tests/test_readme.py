"""Every example of the README runs as written, in the order of the page."""

import re
import shlex
from pathlib import Path

from oocattn import cli

README = Path(__file__).parents[1] / "README.md"


def test_the_commands_and_examples_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    ran = 0
    for language, block in re.findall(r"^```(console|python)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(block, namespace)
            ran += 1
        for command in re.findall(r"^\$ oocattn (?!doctor)(.*)$", block, re.MULTILINE):  # doctor has tests of its own
            assert cli.main(shlex.split(command)) == 0, command
            ran += 1
    assert ran >= 9
    assert capsys.readouterr().out.count("passed") == 1
