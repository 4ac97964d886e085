"""Threads of our own. All are daemons: one that hangs, on a file system or a GPU, keeps no interpreter from its exit.

Python joins the threads of its own pools at exit, and would wait without end as well. A fork has none of them, but the locks
that they held.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

EXIT_SECONDS = 5.0
"""Seconds that calls in flight have to end at the interpreter's exit, and when the `with` of a pool has failed."""

P = ParamSpec("P")
T = TypeVar("T")

_Call = tuple[Future[Any], Callable[[], Any]]


def begin_call(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
    """Begin a call in a thread of its own, which does not keep the process when it never returns."""
    called = Future[T]()
    called.set_running_or_notify_cancel()  # from now on it cannot be cancelled

    def call() -> None:
        try:
            called.set_result(function(*arguments, **options))
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=call, name="oocattn-call", daemon=True).start()
    return called


class ThreadPool(Executor):
    """So many threads, which begin as they are needed; each calls `prepare` before its first call.

    As a context manager it waits for every call; where its body fails, for `EXIT_SECONDS` and without those not begun.
    """

    def __init__(self, count: int, name: str, prepare: Callable[[], object] = lambda: None) -> None:
        self._count = count
        self._name = name
        self._prepare = prepare
        self._calls = SimpleQueue[_Call | None]()
        self._threads: list[threading.Thread] = []
        self._changing = threading.Lock()
        self._end = weakref.finalize(self, self._calls.put, None)  # a pool that is dropped leaves no thread
        _pools.add(self)

    def submit(self, function: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> Future[T]:
        called = Future[T]()
        with self._changing:
            if not self._end.alive:
                raise RuntimeError(f"the threads {self._name} have ended: nothing can begin there")
            self._calls.put((called, lambda: function(*arguments, **options)))
            if len(self._threads) < self._count:
                name, work = f"{self._name}-{len(self._threads)}", (self._calls, self._prepare)
                self._threads.append(threading.Thread(target=_work, args=work, name=name, daemon=True))
                self._threads[-1].start()
        return called

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._changing:
            self._end()
            if cancel_futures:
                self._cancel()
        if wait:
            self.join()

    def _cancel(self) -> None:
        """Cancel the calls that have not begun."""
        with suppress(Empty):
            while True:
                call = self._calls.get_nowait()
                if call is not None:
                    call[0].cancel()
        self._calls.put(None)  # the end was among them, or is put twice

    def join(self, until: float | None = None) -> None:
        """Wait until all threads have ended, or until this moment of the monotonic clock."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown(wait=error is None, cancel_futures=error is not None)
        if error is not None:
            self.join(time.monotonic() + EXIT_SECONDS)


def map_in_order(pool: Executor, function: Callable[..., T], calls: Iterable[Sequence[Any]], ahead: int) -> Iterator[T]:
    """What `function` returns for the arguments of each of `calls`, in their order.

    At most `ahead` calls have begun, or are done, before the result that is yielded.
    """
    begun = deque[Future[T]]()
    for arguments in calls:
        begun.append(pool.submit(function, *arguments))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


class InOrder:
    """Lets threads through one after another, in the order of their turns: what they add up has the same bits each time."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._next = 0
        self._waiting: dict[int, threading.Event] = {}
        """What each turn that is not there yet waits for: to wake all that wait for others would take Python's lock."""

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait for a turn, counted from 0, and have the others wait while inside."""
        come = threading.Event()
        with self._changing:
            if number == self._next:
                come.set()
            else:
                self._waiting[number] = come
        come.wait()
        try:
            yield
        finally:
            with self._changing:
                self._next += 1
                following = self._waiting.pop(self._next, None)
            if following is not None:
                following.set()


def _work(calls: SimpleQueue[_Call | None], prepare: Callable[[], object]) -> None:
    """Do calls in a thread of a pool until it ends; what cannot be prepared fails the call."""
    prepared = False
    while (call := calls.get()) is not None:
        called, function = call
        if called.set_running_or_notify_cancel():
            try:
                if not prepared:
                    prepare()
                    prepared = True
                called.set_result(function())
            except BaseException as error:
                called.set_exception(error)
        del call, called, function  # nothing is kept while the thread waits
    calls.put(None)  # for the other threads


_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _end_pools() -> None:
    """Let calls in flight end at the interpreter's exit: a thread that computes there may end it with an abort."""
    until = time.monotonic() + EXIT_SECONDS
    for pool in list(_pools):
        pool.shutdown(wait=False, cancel_futures=True)
    for pool in list(_pools):
        pool.join(until)


atexit.register(_end_pools)


class ProcessLock:
    """A lock of the threads of a process, which a fork has afresh: a thread that is not there may have held it."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the lock while inside, also where this thread has it already."""
        with self._lock:
            yield
