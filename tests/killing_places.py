"""Where what is killed leaves its result, and what of it is compared: local or in a store, of a second pass, of a survey."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from object_store import BUCKET, empty, objects_in
from passes import planned
from support import BESIDE, MACHINE

import oocattn
from oocattn.kernels.registry import get_kernel
from oocattn.pipelines import second_pass
from oocattn.pipelines.engines import DASHBOARD
from oocattn.pipelines.existing import result_at
from oocattn.pipelines.workplace import Workplace
from oocattn.planning import measure
from oocattn.problem.second_pass import SecondPass
from oocattn.storage.paths import ALL_ROWS, ResultPaths
from oocattn.storage.results.arrays import ResultArrays


class Place:
    """Where the result is: a local path."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.result = folder, folder / "result.zarr"

    @property
    def arguments(self) -> dict[str, Any]:
        """What says to oocattn where it is."""
        return {"result": self.result}

    @property
    def paths(self) -> ResultPaths:
        return ResultPaths.at(self.result)

    def enter(self) -> None:
        """What a process does first."""

    def bits(self) -> dict[str, bytes]:
        """The chunks of a result. (Zarr would start threads, and then nothing may be forked.)"""
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in self.result.glob("*/c.*")}

    def left_behind(self) -> set[str]:
        """What lies beside a finished result that should not, also under temporary names."""
        beside = {path.name for path in self.paths.state.iterdir()} - BESIDE
        return (
            beside | {path.name for path in self.folder.glob(".*")} | {path.name for path in self.result.rglob("*.partial")}
        )

    def clear(self) -> None:
        for leftover in (self.result, self.paths.state):
            shutil.rmtree(leftover, ignore_errors=True)


class StorePlace(Place):
    """Where the result is: a URL of S3. Job state is in a folder, or in the store, for another machine each time."""

    server: ClassVar[dict[str, Any]] = {}
    scratch: ClassVar[str | None] = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"result": f"s3://{BUCKET}/{self.result.name}", "storage_options": self.server, "scratch": self.scratch}

    @property
    def paths(self) -> ResultPaths:
        return ResultPaths.at(f"s3://{BUCKET}/{self.result.name}", self.scratch, storage_options=self.server)

    def enter(self) -> None:
        machines = self.folder / "result.zarr-machines"
        machine = machines / (str(len(list(machines.glob("*")))) if self.scratch else "0")
        machine.mkdir(parents=True, exist_ok=True)
        os.chdir(machine)

    def bits(self) -> dict[str, bytes]:
        found = objects_in(self.server, f"{self.result.name}/")
        chunks = {key.partition("/")[2]: content for key, content in found.items() if "/c/" in key}
        return chunks if f"{self.result.name}/zarr.json" in found else {}

    def left_behind(self) -> set[str]:
        beside = set(objects_in(self.server, f"{self.result.name}.oocattn/"))
        here = set() if self.scratch else {path.name for path in (self.folder / "result.zarr-machines").glob("*/*")}
        return beside - {f"{self.result.name}.oocattn/{name}" for name in BESIDE} | here

    def clear(self) -> None:
        empty(self.server)
        shutil.rmtree(self.folder / "result.zarr-machines", ignore_errors=True)


class PassPlace(Place):
    """A local result over whose pairs there is a second pass: what that leaves is kept here, and compared."""

    def compute(self) -> None:
        """Compute the pass, as planned on a machine that is made up, and have it removed."""
        hardware = replace(MACHINE, kernel="weights", scratch_bytes=get_kernel("weights").scratch_bytes)
        measure.describe_hardware = lambda *_, **__: hardware
        result = result_at(self.paths)
        first = second_pass.FirstPass.open(self.paths, ResultArrays(result.out, result.lse), None, None)
        workplace = Workplace("inline", None, DASHBOARD)
        asked = second_pass.Asked(SecondPass(7), ALL_ROWS, other=True)
        with second_pass.second_pass(first, asked, 1 << 30, workplace, [], math.inf) as found:
            for name, array in found.arrays.by_name.items():
                (self.folder / f"pass-{name}").write_bytes(np.asarray(array[...]).tobytes())

    def bits(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("pass-*")}

    def clear(self) -> None:
        for path in self.paths.state.iterdir():
            if path.name not in BESIDE:
                shutil.rmtree(path)
        for path in self.folder.glob("pass-*"):
            path.unlink()


class SurveyPlace(Place):
    """A local result that is surveyed, in place of another survey where it `replaces` one: all of its files are compared."""

    replaces: ClassVar[bool] = False

    def compute(self, chunks: int, partials: str) -> None:
        """Survey the result, by so many chunks."""
        with planned(chunks, partials=partials):
            oocattn.survey(self.result, top=4, pool=16, engine="inline", overwrite=self.replaces)

    def bits(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.result)): path.read_bytes() for path in self.result.rglob("*") if path.is_file()}

    def keep(self) -> None:
        """Have the result as it is brought back by `clear`."""
        if self.replaces:
            with planned(1):
                oocattn.survey(self.result, top=2, pool=5, mean_heads=True, engine="inline")
        for place in (self.result, self.paths.state):
            shutil.copytree(place, self.folder / "kept" / place.name)

    def clear(self) -> None:
        super().clear()
        shutil.copytree(self.folder / "kept", self.folder, dirs_exist_ok=True)
