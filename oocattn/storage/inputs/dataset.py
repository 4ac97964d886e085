"""A dataset: a Zarr group with the arrays q, k and v, and perhaps key_bias, at a path or behind a URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import zarr

from oocattn import naming
from oocattn.errors import IntegrityError, ProblemError, RemoteDeniedError
from oocattn.problem.arrays import KEY_BIAS, ArraySpec
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem, make_problem
from oocattn.problem.recorded import RecordedCall
from oocattn.problem.second_pass import LSE
from oocattn.records import differences, to_json
from oocattn.storage.chunk_errors import PageError
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.fingerprints import NAMES, Fingerprints, identity
from oocattn.storage.inputs.given_store import GivenStore
from oocattn.storage.inputs.meaning import MEANINGFUL, dimension_names, order_by_names, refuse_packed, warn_if_transposed
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.values import checksum, sample
from oocattn.storage.inputs.zarr_nodes import Place, open_node, open_zarr_array, what_is_at
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.locations import parse_location
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import array_names, open_array, open_consolidated, read_group
from oocattn.storage.nodes import attributes_of
from oocattn.storage.remote.options import StorageOptions
from oocattn.storage.zarr_compat import Store
from oocattn.text import printable
from oocattn.threads import ThreadPool

T = TypeVar("T")

MOST_NAMED = 10  # arrays that the message names where one is missing


@dataclass(frozen=True)
class Dataset:
    """The input of a run: the tensors "q", "k" and "v", and "key_bias" where there is one and it is used.

    They lie in a group, at `location`, or each at its own place (`in_group` is False, `location` names them for messages).
    `recorded` is what the model asked whose layer it holds; None where that is not known, or not to be used.
    """

    location: str
    arrays: dict[str, TensorSource]
    in_group: bool = True
    recorded: RecordedCall | None = None

    @classmethod
    def open(
        cls,
        place: Place,
        *,
        key_bias: bool = True,
        recorded: bool = False,
        storage_options: StorageOptions | None = None,
    ) -> Dataset:
        """Open a Zarr group, v3 or v2, for reading: at a path or a URL, which is checked first, or of a store.

        The `storage_options` are for a URL. Without `key_bias` an array of that name is not looked at. What its model asked
        is read where it is to be `recorded`.

        Raises ProblemError if there is no group, no array q, k or v in it that can be read, or one whose attributes give its
        numbers or axes another meaning, and IntegrityError if its metadata is damaged.
        """
        try:
            store, location = open_node(place, storage_options)
        except FileNotFoundError as error:
            raise _no_group(str(parse_location(place)), "found nothing") from error
        return cls._open_in(store, location, (KEY_BIAS,) if key_bias else (), recorded)

    @classmethod
    def _open_in(cls, store: Store, location: str, optional: Sequence[str], recorded: bool = False) -> Dataset:
        group = read_group(store, location)
        if group is None:
            raise _no_group(location, what_is_at(store, location))
        required = NAMES[:3]
        arrays = together(lambda name: _array(store, name, location), required, not isinstance(store, MappedStore))
        consolidated = open_consolidated(store, group, (*required, *optional), location)
        for name in optional:
            found = _optional_array(store, name, location, listed=name in consolidated)
            arrays |= {} if found is None else {name: found}
        for name, other in consolidated.items():
            _check_consolidated(arrays[name], other, location)
        for array in arrays.values():
            refuse_packed(array, location)
        axes, reading = {name: _axes(name, array, location) for name, array in arrays.items()}, DirectReader()
        sources = {name: ZarrSource(name, array, location, reading, axes[name]) for name, array in arrays.items()}
        attributes = attributes_of(group, location) if recorded else {}
        return cls(location, {**sources}, recorded=RecordedCall.read(attributes, location))

    @classmethod
    def of(cls, arrays: dict[str, TensorSource]) -> Dataset:
        """The dataset of tensors that lie apart."""
        ordered = {name: arrays[name] for name in NAMES if name in arrays}
        where = ", ".join(f"{name} {source.origin.recorded}" for name, source in ordered.items())
        return cls(where, ordered, in_group=False)

    def with_lse(self, lse: zarr.Array[Any]) -> Dataset:
        """The same for a second pass: with the log-sum-exp of its result."""
        opened = open_zarr_array(LSE, lse)
        assert opened is not None
        return Dataset.of({**self.arrays, LSE: opened.source(LSE, Axes("bhn"))})

    def reopen(self) -> Dataset:
        """The dataset as it is now: what says how its tensors lie is read again. Raises as `open`."""
        if self.in_group:
            optional = [name for name in self.arrays if name == KEY_BIAS]
            return self._open_in(self.store, self.location, optional, self.recorded is not None)
        return Dataset(self.location, {name: source.reopen() for name, source in self.arrays.items()}, in_group=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.location, self.arrays, self.in_group, self.recorded)

    @property
    def store(self) -> Store:
        """The store of the group. Raises ProblemError where the tensors are in none."""
        found = self.arrays["q"]
        if not (self.in_group and isinstance(found, ZarrSource)):
            raise ProblemError(
                f"the inputs {self.location} are in no group, of which an array could be named: give the array itself, or "
                "the path of an .npy file"
            )
        return found.array.store

    @property
    def paths(self) -> tuple[Path, ...]:
        """The local files and folders that the tensors lie in."""
        return tuple(source.path for source in self.arrays.values() if source.path is not None)

    @property
    def origins(self) -> dict[str, Origin]:
        """Where the tensors lie; empty where they are in a group."""
        return {} if self.in_group else {name: source.origin.recorded for name, source in self.arrays.items()}

    @property
    def specs(self) -> tuple[ArraySpec, ArraySpec, ArraySpec]:
        """Names, shapes and dtypes of q, k and v."""
        return self.arrays["q"].spec, self.arrays["k"].spec, self.arrays["v"].spec

    @property
    def key_bias(self) -> ArraySpec | None:
        """Name, shape and dtype of key_bias; None where there is none, or none is used."""
        found = self.arrays.get(KEY_BIAS)
        return None if found is None else found.spec

    def words(self, problem: Problem) -> str:
        """What a problem asks because it is recorded here; "" for nothing."""
        found = ", ".join(self.recorded.words(problem)) if self.recorded is not None else ""
        return f"{found}, of the dataset" if found else ""

    def record(self) -> dict[str, Any]:
        """What a result keeps of it, as JSON, besides `samples`."""
        return {"location": self.location, "fingerprint": self.as_found.recorded, "tensors": to_json(self.origins)}

    def check_complete(self) -> None:
        """Check that all of the tensors is there. Raises IntegrityError naming what is missing."""
        self._of_each(lambda source: source.check_complete())

    def fingerprints(self) -> Fingerprints:
        """The fingerprints of the dataset as it is now. Raises IntegrityError for a part that is found to be missing."""
        found = self._of_each(lambda source: source.fingerprints())
        last = max(map(NAMES.index, found))
        in_order = [found.get(name, ("", "", "")) for name in NAMES[: last + 1]]
        return Fingerprints(*("-".join(digests) for digests in zip(*in_order, strict=True)))

    @cached_property
    def as_found(self) -> Fingerprints:
        """The fingerprints when first asked for: later ones show every change."""
        return self.fingerprints()

    def fingerprint_again(self) -> str:
        """The fingerprint `within_run` of the dataset as it is now: what says how its tensors lie is read again, too.

        Stores that let requests wait are asked for both at the same time. Raises as `open` and `fingerprints`.
        """
        if not self._is_remote:
            return self.reopen().fingerprint(within_run=True)
        with ThreadPool(2, "oocattn-ask") as pool:
            reopening, finding = pool.submit(self.reopen), pool.submit(self.fingerprints)
            reopened = reopening.result()
            return finding.result().within_run if self._lies_as(reopened) else reopened.fingerprint(within_run=True)

    def _lies_as(self, other: Dataset) -> bool:
        """Whether all that fingerprints say of how tensors lie is the same in another dataset."""
        if self.arrays.keys() != other.arrays.keys():
            return False
        return all(_lie_alike(source, other.arrays[name]) for name, source in self.arrays.items())

    @cached_property
    def samples(self) -> str:
        """Digests of the numbers of each tensor, joined by "-": none where its fingerprint is one.

        Of arrays in a store in memory it is "=" and the checksum of all numbers, of others that of a sample; none where
        these cannot be read, which the run will find.
        """
        return "-".join(self._of_each(_digest_numbers).values())

    def _of_each(self, ask: Callable[[TensorSource], T]) -> dict[str, T]:
        """What is found of each tensor, by name; stores that let requests wait are asked at the same time."""
        return together(lambda name: ask(self.arrays[name]), self.arrays, self._is_remote)

    @property
    def _is_remote(self) -> bool:
        """Whether any tensor is in a store that may let requests wait."""
        return any(source.is_remote for source in self.arrays.values())

    def fingerprint(self, *, within_run: bool = False) -> str:
        """One fingerprint of the dataset as it is now: recorded, or `within_run`."""
        found = self.fingerprints()
        return found.within_run if within_run else found.recorded


def together(ask: Callable[[str], T], names: Iterable[str], at_once: bool) -> dict[str, T]:
    """What is found by each name: one after another, or at the same time. Raises the first error, by their order."""
    names = list(names)
    if not at_once:
        return {name: ask(name) for name in names}
    with ThreadPool(len(names), "oocattn-ask") as pool:
        return dict(zip(names, pool.map(ask, names), strict=True))


def _lie_alike(one: TensorSource, other: TensorSource) -> bool:
    """Whether metadata of two arrays of Zarr say the same of how their bytes are to be read; of other tensors, False."""
    if not (isinstance(one, ZarrSource) and isinstance(other, ZarrSource)):
        return False
    return one.axes == other.axes and identity(one.array) == identity(other.array)


def _digest_numbers(source: TensorSource) -> str:
    if source.origin.in_memory:
        return ""
    in_store = isinstance(source, ZarrSource) and isinstance(source.array.store, GivenStore) and source.array.store.in_memory
    with suppress(IntegrityError):
        return f"={checksum(source)}" if in_store else sample(source)
    return ""


def pose(dataset: Dataset, options: ProblemOptions) -> Problem:
    """The problem of a dataset with these options. Raises as `make_problem`, and warns of more heads than tokens."""
    problem = make_problem(*dataset.specs, options, dataset.key_bias)
    warn_if_transposed(dataset.specs[0], dataset.specs[1])
    return problem


def check_poses(dataset: Dataset, problem: Problem, whose: str) -> None:
    """Raise ProblemError where a dataset poses another problem than `problem`, of a "run" or a "result" (`whose`)."""
    advice = f"name the dataset that the run read, with {naming.named('inputs')}"
    try:
        posed = pose(dataset, problem.options)
    except ProblemError as error:
        raise ProblemError(f"{dataset.location} does not pose the {whose}'s problem: {advice} ({error})") from None
    if posed != problem:
        raise ProblemError(
            f"{dataset.location} poses another problem than the {whose}'s ({differences(problem, posed)}): {advice}"
        )


def _meaning(array: zarr.Array[Any]) -> dict[str, Any]:
    """What metadata say of an array's numbers and axes, by name."""
    attributes = {name: array.attrs[name] for name in MEANINGFUL if name in array.attrs}
    names = getattr(array.metadata, "dimension_names", None)
    return {**identity(array), "dimension_names": names and list(names), **attributes}


def _check_consolidated(array: zarr.Array[Any], consolidated: zarr.Array[Any], location: str) -> None:
    """Raise ProblemError where consolidated metadata differ from the array's. Zarr and xarray believe the former."""
    own, other = _meaning(array), _meaning(consolidated)
    for field in sorted({*own, *other}):
        if json.dumps(own.get(field), default=str) != json.dumps(other.get(field), default=str):
            raise ProblemError(
                f"array {array.path!r} of {location} has {field} = {printable(repr(own.get(field))):.80}, but "
                f"{printable(repr(other.get(field))):.80} in the consolidated metadata of its group: expected the same in "
                "both, for many programs read these; bring them up to date with zarr.consolidate_metadata(PATH)"
            )


def _axes(name: str, array: zarr.Array[Any], location: str) -> Axes | None:
    """The axes of an array by its dimension names; None where these say nothing."""
    label = f"{name} ({location})"
    order = order_by_names(name, label, dimension_names(array))
    return None if order is None else Axes(order)


def _no_group(location: str, reason: str) -> ProblemError:
    apart = naming.by_face("oocattn.Inputs(q=..., k=..., v=...)", "--q --k --v")
    return ProblemError(
        f"no Zarr group at {location} ({reason}): give the path or URL of a group with the arrays q, k and v; "
        f"tensors that lie elsewhere are named one by one ({apart})"
    )


def _optional_array(store: Store, name: str, location: str, *, listed: bool) -> zarr.Array[Any] | None:
    """An array that may be missing, unless it is listed in consolidated metadata."""
    try:
        found = open_array(store, name, location)
    except (RemoteDeniedError, PageError):  # also the answer for a missing object, of some servers
        if listed:
            raise
        return None
    if found is None and listed:
        raise ProblemError(
            f"array {name!r} of {location} is missing, but in the consolidated metadata of its group: expected it in both "
            "or in neither; bring them up to date with zarr.consolidate_metadata(PATH)"
        )
    return found


def _array(store: Store, name: str, location: str) -> zarr.Array[Any]:
    array = open_array(store, name, location)
    if array is not None:
        return array
    found = array_names(store)
    more = " and more" if len(found) > MOST_NAMED else ""
    shown = f"found {[printable(other) for other in found[:MOST_NAMED]]}{more}"
    if not store.supports_listing:
        shown = "its server does not list what is there"
    raise ProblemError(
        f"no array {name!r} in {location}: {shown}; a dataset has the arrays q, k and v: rename the "
        f"array, or import the tensors with {naming.by_face('oocattn.import_arrays', '`oocattn import`')}"
    )
