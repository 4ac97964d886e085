"""The `Result` of a run: its arrays, its report and its certificate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr
from zarr.storage import StorePath

from oocattn.pipelines.watch.report import RunReport
from oocattn.planning.plan import Plan
from oocattn.shown import Shown
from oocattn.storage.metadata import describe_array
from oocattn.storage.results.summary import Summary

if TYPE_CHECKING:
    import dask.array
    import xarray

FORMAT = 1
"""Of the JSON document."""


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """A finished result: `out` [B, Hq, N, D] in the output's dtype, `lse` [B, Hq, N] float32, and how it came about.

    `path` is where it is: of a result in a store its URL, or what the store is called.

    NumPy shows bfloat16 as the dtype of ml_dtypes, as it has none of its own; to torch without a copy:
    `torch.from_numpy(result.out[0].view("uint16")).view(torch.bfloat16)`.

    `report` is None for a result that was copied without the folder beside it. `certificate` sums up that of a result that
    was there already, where it was verified: it may have failed. `plan` is what was carried out; None where the result was
    there already.
    """

    path: Path | str
    out: zarr.Array[Any]
    lse: zarr.Array[Any]
    report: RunReport | None
    certificate: Summary | None = None
    plan: Plan | None = None

    @property
    def result_place(self) -> Path | StorePath:
        """Where it is, as functions take it that are given this in place of a path: of one in a store, there."""
        return self.path if isinstance(self.path, Path) else StorePath(self.out.store, self.out.path.rpartition("/")[0])

    def to_json(self) -> dict[str, Any]:
        """Where the result is, its arrays, plan, report and certificate, as a JSON document (docs/scripts.md)."""
        names = ("outcome", "verdict", "made", "digest")
        return {
            "format": FORMAT,
            "path": str(self.path),
            "out": describe_array(self.out),
            "lse": describe_array(self.lse),
            "plan": None if self.plan is None else self.plan.to_json(),
            "report": None if self.report is None else self.report.to_json(),
            "certificate": None if self.certificate is None else {name: getattr(self.certificate, name) for name in names},
        }

    def _line(self) -> str:
        return f"out {list(self.out.shape)} {self.out.dtype}, lse {self.lse.dtype}, {self.path}"

    def _table(self) -> list[tuple[str, str]]:
        rows = [("path", str(self.path))]
        rows += [(name, f"{list(array.shape)} {array.dtype}") for name, array in (("out", self.out), ("lse", self.lse))]
        rows += [] if self.report is None else self.report._table()
        return rows + ([] if self.certificate is None else [("certificate", self.certificate.verdict)])

    def to_dask(self) -> dict[str, dask.array.Array]:
        """`out` and `lse` as Dask arrays, a block for each chunk; nothing is read yet."""
        import dask.array

        return {name: dask.array.from_zarr(array) for name, array in (("out", self.out), ("lse", self.lse))}

    def to_xarray(self) -> xarray.Dataset:
        """The arrays of the result, also those that the run was given, with named dimensions; nothing is read yet.

        As `xarray.open_zarr(path)`. Raises ModuleNotFoundError without xarray (`pip install 'oocattn[xarray]'`).
        """
        try:
            import xarray
        except ModuleNotFoundError as error:
            words = "to_xarray needs xarray, which is not installed: pip install 'oocattn[xarray]'"
            raise ModuleNotFoundError(words, name="xarray") from error
        with warnings.catch_warnings():  # xarray leaves a filter behind
            opened: xarray.Dataset = xarray.open_zarr(
                self.out.store, group=self.out.path.rpartition("/")[0], consolidated=False
            )
        return opened
