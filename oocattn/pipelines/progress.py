"""A progress bar on the terminal: subproblems, tokens per second and the time left."""

from __future__ import annotations

import sys
import time
from typing import cast

from tqdm import tqdm

from oocattn.pipelines.events import Event
from oocattn.plans import Plan


class ProgressBar:
    """A listener that draws a tqdm bar on standard error and prints the dashboard's address above it."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._tokens_each = 0.0

    def __call__(self, event: Event) -> None:
        if event.kind == "started":
            plan = cast(Plan, event.detail["plan"])
            if event.detail["dashboard"]:
                tqdm.write(f"dashboard {event.detail['dashboard']}", file=sys.stderr)
            self._tokens_each = plan.problem.tokens * plan.problem.batch / plan.subproblems
            done = plan.subproblems - cast(int, event.detail["left"])
            self._bar = tqdm(total=plan.subproblems, initial=done, unit="subproblem", dynamic_ncols=True)
        elif self._bar is not None and event.kind == "mended":
            self._bar.n = self._bar.total - cast(int, event.detail["left"])
        elif self._bar is not None and event.kind == "attended":
            self._bar.update()
            rate = (self._bar.n - self._bar.initial) * self._tokens_each / max(time.time() - self._bar.start_t, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        elif self._bar is not None and event.kind in ("failed", "ended"):
            self._bar.close()
            self._bar = None
