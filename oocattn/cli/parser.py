"""What the `oocattn` command says of words that it does not understand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from oocattn.cli.exit_codes import BAD_USAGE
from oocattn.other_names import hint
from oocattn.text import printable


class Parser(argparse.ArgumentParser):
    """A parser that says on one line what is wrong, and where the options are explained. Names are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        found = printable(message.removeprefix("argument "))
        name, _, wrong = found.partition(": ")
        action = self._option_string_actions.get(name)
        if wrong == "expected one argument":
            found += f" (one that begins with a minus: {name}=-1)"
        elif action is not None and isinstance(action.metavar, tuple) and wrong.startswith("expected "):
            found += f", {' '.join(action.metavar)}"
        self.exit(BAD_USAGE, f"{self.prog}: {found}; see {self.prog} --help\n")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """End the command where any words are left that are none of its options."""
        for word in words:
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            known = {option.lstrip("-").replace("-", "_") for option in self._option_string_actions}
            advice = hint(name, known) if word.startswith("--") else ""
            self.error(f"{word} is not expected{advice and ': '}{advice}")
