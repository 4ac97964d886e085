"""Partials folded into accumulators in host memory, and saved at an interval."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from oocattn import clock
from oocattn.errors import IntegrityError
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.memory import States
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId, row_blocks
from oocattn.pipelines.lane.partials.store import Accumulators, DamagedPartialError, Destination, MergedChunk, Sums
from oocattn.planning.plan import Plan
from oocattn.storage.files.operations import shows_damage, words_of

Place = tuple[int, int]  # a head group and one of its query chunks


@dataclass
class _Fold:
    """A chunk's accumulator, and its `contributors`: how many there are, are started, folded and saved.

    `unsaved_since` is when the first began that is not saved, `folded_at` when the last one ended.
    """

    state: AttentionState
    contributors: int
    started: int
    folded: int
    saved: int
    not_finite: int
    unsaved_since: float = 0.0
    folded_at: float = 0.0
    save_pending: bool = False
    being_saved: bool = False

    @property
    def idle(self) -> bool:
        """True if nothing is being folded in."""
        return self.started == self.folded

    @property
    def can_be_saved(self) -> bool:
        """True if nothing is being folded in, and no other thread saves it."""
        return self.idle and not self.being_saved

    @property
    def ends(self) -> bool:
        """True if the last contributor has begun: the chunk is written next."""
        return self.started == self.contributors

    @property
    def oldest(self) -> float:
        """Since when there is something to save, or a chunk that has all waits to be written."""
        return self.folded_at if self.ends and self.idle else self.unsaved_since


class MemoryPartials:
    """Each partial is folded into its chunk's accumulator, in order, so that a file says how many contributors it has.

    While an accumulator is being written nothing is folded into it, and where no other is left to be written, one that is
    never idle is made so, unless its last partial is in flight: then its chunk is finished next. One thread begins partials;
    any may end them and save. Implements PartialStore.
    """

    def __init__(self, plan: Plan, files: PartialFiles, accumulators: States) -> None:
        self._plan = plan
        self._files = files
        self._accumulators = Accumulators(plan, accumulators)
        self._changed = threading.Condition()
        self._folds: dict[Place, _Fold] = {}
        self._stopped_waiting = False

    def begin(self, head_group: int, chunk: int, subproblem: int, not_finite: int = 0) -> Destination:
        place = (head_group, chunk)
        contributors = self._contributors(place)
        known = self._folds.get(place)
        position = contributors.index(subproblem) if subproblem in contributors else -1
        if position < 0 or (known and position != known.started):
            expected = contributors[known.started :][:1] if known else contributors[:1]
            raise IntegrityError(
                f"head group {head_group}, chunk {chunk}: the partial of subproblem {subproblem} came, expected "
                f"{expected[0] if expected else 'no more'}"
            )
        fold = known or self._take(place, position)
        with self._changed:
            self._changed.wait_for(lambda: not fold.being_saved and not (fold.save_pending and fold.idle))
            if fold.started == fold.saved:
                fold.unsaved_since = clock.now()
            fold.started += 1
            fold.not_finite += not_finite
            self._changed.notify_all()
        return Destination(fold.state, merged=position > 0)

    def save_pending(self, head_group: int, chunk: int) -> bool:
        fold = self._folds.get((head_group, chunk))
        return fold is not None and fold.save_pending and not fold.idle

    def end(self, head_group: int, chunk: int, subproblem: int, sums: Sums = ()) -> int:
        written = self._files.write_sums(PartialId(head_group, chunk, (subproblem,)), sums)
        with self._changed:
            fold = self._folds[head_group, chunk]
            fold.folded, fold.folded_at = fold.folded + 1, clock.now()
            self._changed.notify_all()
        return written

    def collect(self, head_group: int, chunk: int) -> MergedChunk:
        contributors = self._contributors((head_group, chunk))
        fold = self._folds.get((head_group, chunk)) or self._take((head_group, chunk), len(contributors))
        if not contributors:  # no row of it attends a key
            fold.state.reset()
        if missing := contributors[fold.started :]:
            raise IntegrityError(f"head group {head_group}, chunk {chunk}: no partial of subproblems {list(missing)}")
        return MergedChunk(fold.state, fold.not_finite)

    def release(self, head_group: int, chunk: int) -> None:
        with self._changed:
            fold = self._folds[head_group, chunk]
            self._changed.wait_for(lambda: not fold.being_saved)
            del self._folds[head_group, chunk]
            self._changed.notify_all()
        if fold.saved:
            self._files.remove(self._partial_id((head_group, chunk), fold.saved))
        self._accumulators.give_back(head_group, chunk)

    def save(self, patient: bool, recent: float = 0.0) -> int:
        with self._changed:
            before = clock.now() - recent
            due = {place for place, fold in self._folds.items() if fold.saved < fold.started and fold.oldest <= before}
        written = 0
        while (place := self._next_due(due, patient)) is not None:
            due.remove(place)
            written += self._save(place)
        return written

    def stop_waiting(self) -> None:
        with self._changed:
            self._stopped_waiting = True
            self._changed.notify_all()

    def close(self) -> None:
        self._folds.clear()
        self._accumulators.close()

    def _contributors(self, place: Place) -> tuple[int, ...]:
        head_group, chunk = place
        return self._plan.division_of(head_group).contributors(chunk)

    def _take(self, place: Place, count: int) -> _Fold:
        """An accumulator for a chunk, with the first `count` contributors from its file."""
        state, not_finite = self._accumulators.take(*place), 0
        if count:
            partial = self._partial_id(place, count)
            try:
                with self._files.fetched(partial):
                    not_finite = self._files.not_finite(partial)
                    for _ in self._files.read(partial, row_blocks(state)):
                        pass
            except BaseException as error:
                self._accumulators.give_back(*place)
                if not shows_damage(error):
                    raise
                self._files.remove(partial)
                raise DamagedPartialError(words_of(error), *place, partial.subproblems[0]) from error
        with self._changed:
            of_chunk = len(self._contributors(place))
            self._folds[place] = fold = _Fold(state, of_chunk, count, count, count, not_finite)
        return fold

    def _next_due(self, due: set[Place], patient: bool) -> Place | None:
        """An idle chunk of those that are `due`, which become fewer; None where there is none, and none will come.

        It waits for those that another thread saves, and while it is `patient` for those in flight.
        """
        waited: _Fold | None = None
        with self._changed:
            while True:
                self._drop_settled(due, patient)
                place = next((place for place in due if self._folds[place].can_be_saved), None)
                waits = (patient and not self._stopped_waiting) or any(self._folds[place].being_saved for place in due)
                if place is not None or not due or not waits:
                    break
                busy = self._folds[next(iter(due))]
                if waited is not None and waited is not busy:
                    waited.save_pending = False
                    self._changed.notify_all()  # of those that it kept from beginning
                waited, busy.save_pending = busy, True
                self._changed.wait()
            if waited is not None:
                waited.save_pending = False
            if place is not None:
                self._folds[place].being_saved = True
            self._changed.notify_all()
            return place

    def _drop_settled(self, due: set[Place], patient: bool) -> None:
        """Leave out chunks that are written or saved, and, while it is `patient`, those whose last partial is in flight."""
        due.intersection_update([place for place, fold in self._folds.items() if fold.saved < fold.started])
        if patient:  # these are finished next, which a save would hold up
            due.difference_update([place for place in due if self._folds[place].ends and not self._folds[place].idle])

    def _save(self, place: Place) -> int:
        fold = self._folds[place]
        try:
            written = self._files.write(self._partial_id(place, fold.folded), fold.state, fold.not_finite)
            fold.saved = fold.folded
            return written
        finally:
            with self._changed:
                fold.being_saved = False
                self._changed.notify_all()

    def _partial_id(self, place: Place, count: int) -> PartialId:
        return PartialId(*place, self._contributors(place)[:count])
