"""A lane: one device that works through subproblems: stage, attend, merge, write.

A lane is composed of parts, each of which owns what it allocates and gives it back when it is closed. They refer to those
made before them only, so a closed lane leaves no reference circles. Which subproblem comes when, and that no buffer is used
for two things at once, is the graph's business.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeVar

from oocattn.errors import ProblemError
from oocattn.operations import Operation, make_operation
from oocattn.pipelines.failing import naming_subproblem
from oocattn.pipelines.lane.checkpoints import Checkpoints
from oocattn.pipelines.lane.cpu import CpuDevice
from oocattn.pipelines.lane.cuda import CudaDevice
from oocattn.pipelines.lane.device import Device, Health
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.memory import HostMemory, States
from oocattn.pipelines.lane.partials.disk import DiskPartials, MergeStates
from oocattn.pipelines.lane.partials.files import PartialFiles
from oocattn.pipelines.lane.partials.memory import MemoryPartials
from oocattn.pipelines.lane.partials.store import PartialStore
from oocattn.pipelines.lane.process_memory import MemoryMeter
from oocattn.pipelines.lane.stager import Stager, Turns
from oocattn.pipelines.run import Run
from oocattn.pipelines.watch.events import Attended, Merged, TaskEvent, Written
from oocattn.planning.plan import Plan

E = TypeVar("E", bound=TaskEvent)

DEVICES: Mapping[str, Callable[[str, Plan, Operation, Health], Device]] = {"cpu": CpuDevice, "cuda": CudaDevice}
"""Devices by the kind of a name like "cuda:1"; a new kind is one new line here."""


class Lane:
    """The lane of a run on a device, called from several tasks of a worker at a time.

    Its `stage` is that of `Stager`.
    """

    def __init__(self, run: Run, device_name: str) -> None:
        for path in (run.paths.scratch, *run.dataset.paths):
            if not path.exists():
                raise ProblemError(f"no {path} on {socket.gethostname()}: the workers of a run must see the same paths")
        self._meter = MemoryMeter(device_name)
        self.plan = plan = run.plan
        self.result = run.result
        operation, make_device = make_operation(plan), DEVICES[device_name.partition(":")[0]]
        with ExitStack() as parts:  # closes what was made, the last first, where the rest cannot be made
            self._health = health = parts.enter_context(closing(Health()))
            self.device = device = parts.enter_context(closing(make_device(device_name, plan, operation, health)))
            self.memory = memory = parts.enter_context(closing(HostMemory(plan, device.allocate, device.allocator)))
            files = PartialFiles(run.paths.scratch, run.journal.run, run.journal.claim, health.step, run.journal.mirror)
            partials = make_partials(plan, files, memory.states, device.merge)
            self.partials = parts.enter_context(closing(partials))
            blocks, finalise, cores = memory.out_blocks, device.finalise, device.cores
            finisher = Finisher(plan, operation, partials, run.result, run.journal, blocks, finalise, cores)
            self.finisher = parts.enter_context(closing(finisher))
            stager = Stager(plan, operation, run.dataset, memory.slots, device.readers, health.step)
            self._stager = parts.enter_context(closing(stager))
            self.stage = stager.stage
            self._attend_turns = Turns("attend", len(memory.slots))
            self._next_turn = 0
            self._stopped = False
            self._told_copied = (0, 0)
            self._telling = threading.Lock()
            self._launched: dict[int, Callable[[], Attended]] = {}
            seconds = plan.checkpoint_seconds if plan.saves else 0.0
            self._checkpoints = parts.enter_context(closing(Checkpoints(partials, seconds, health.fail)))
            self._parts = parts.pop_all()

    @property
    def stepped(self) -> float:
        """Time of the last step of a task, in seconds since the epoch."""
        return self._health.stepped

    @property
    def pairs(self) -> int:
        """Query-key pairs that were attended so far, tile by tile."""
        return self._health.pairs

    def attend(self, turn: int) -> Attended | None:
        """Compute the partials of the subproblem staged for this turn; hand them over; None where the lane was stopped.

        Subproblems begin in the order of their turns, also those before an early task. The event also has the checkpoints
        that were made meanwhile, and the memory that is held. Raises RuntimeError for a turn that was taken before.
        """
        self._attend_turns.take(turn)
        self.device.launcher.submit(self._launch_until, turn).result()
        finish = self._launched.pop(turn, None)
        if finish is None:
            return None
        return self._with_copied(replace(self._checkpoints.add_to(finish()), memory=self._meter.read()))

    def merge(self, head_group: int, chunk: int) -> Merged:
        """Merge the partials of a query chunk (`Finisher`)."""
        return self._with_copied(self.finisher.merge(head_group, chunk))

    def write(self, head_group: int, chunk: int) -> Written:
        """Write a query chunk to the result (`Finisher`)."""
        return self._with_copied(self.finisher.write(head_group, chunk))

    def _with_copied(self, event: E) -> E:
        """The event with the bytes that were copied since the one before."""
        with self._telling:
            before, self._told_copied = self._told_copied, (self._health.copied_in, self._health.copied_out)
            copied_in, copied_out = self._told_copied
        return replace(event, copied_in=copied_in - before[0], copied_out=copied_out - before[1])

    def _launch_until(self, turn: int) -> None:
        """Launch what was staged up to this turn, in order."""
        with self._health.reraise_first_failure():
            while self._next_turn <= turn and not self._stopped:
                staged = self._stager.take(self._next_turn)
                with naming_subproblem(staged.head_group, staged.index):
                    self._launched[self._next_turn] = self.device.launch(staged, self.partials, self.finisher)
                self._next_turn += 1

    def stop(self) -> None:
        """Begin no more subproblems, not those either whose tasks wait for their turn."""
        self._stopped = True

    def save(self) -> int:
        """Save what is in memory alone, at the end, if the plan says so; return the bytes."""
        self._checkpoints.close()
        return self.partials.save(patient=False) if self.plan.saves else 0

    def close(self) -> None:
        """Give back what the lane holds; nothing runs on it any more."""
        self.memory.stop()
        self._launched.clear()
        self._parts.close()


def make_partials(plan: Plan, files: PartialFiles, states: Mapping[str, States], merge_states: MergeStates) -> PartialStore:
    """The store that the plan names, with the states that `Buffers` counts for it."""
    if plan.partials == "memory":
        return MemoryPartials(plan, files, states["accumulators"])
    return DiskPartials(plan, files, states, merge_states)
