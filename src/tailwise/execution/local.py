"""The local executor: this process for kernels with threads, worker processes for the rest."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, get_context, resource_tracker
from types import FrameType, ModuleType, TracebackType
from typing import Any, cast

from tailwise.errors import UserError
from tailwise.execution.base import Calls, Executor, Needs, Worker, default_workers
from tailwise.log import LEVEL, show_log
from tailwise.storage.local import begin_part, in_part

LOSSES = 3  # workers that die in a row before a run is given up

logger = logging.getLogger(__name__)


class WorkerLostError(UserError):
    """Worker processes die again and again."""


class LocalExecutor(Executor):
    """Run tasks on this machine: those with threads of their own in this process, others in worker processes."""

    def __init__(self) -> None:
        self._worker = Worker()  # of this process

    def slots(self, needs: Needs) -> int:
        """Return how many items run at the same time."""
        if needs.device is not None:
            return len(_devices(needs))
        return 1 if needs.all_cpus else needs.workers or default_workers()

    def forget(self) -> None:
        """Drop what this process keeps; worker processes end with each call of `map`."""
        self._worker = Worker()

    def _run(self, calls: Calls[Any, Any], batches: Iterable[Sequence[Any]], needs: Needs) -> Generator[Any]:
        devices = _devices(needs)
        if self.slots(needs) == 1:
            self._worker.device = devices[0]
            return (calls(batch, self._worker) for batch in batches)
        return _run_in_processes(calls, batches, self.slots(needs), devices, needs.results)


def _devices(needs: Needs) -> list[str | None]:
    """Return the devices that are needed, by name; [None] if none is."""
    if needs.device is None:
        return [None]
    from tailwise.devices import find_devices  # noqa: PLC0415  (imports torch: seconds)

    return [str(device) for device in find_devices(needs.device)]


def _run_in_processes(
    calls: Calls[Any, Any], batches: Iterable[Sequence[Any]], workers: int, devices: Sequence[str | None], results: int
) -> Generator[Any]:
    """Yield the results of batches in order, with at most `results` a worker under way; a single batch runs in this process.

    Each device has workers of its own; batch i runs on device i mod n.

    Raises:
        WorkerLostError: LOSSES workers in a row died before the oldest batch was done.
    """
    left = enumerate(batches)
    first = list(islice(left, results * workers))
    if len(first) <= 1:
        yield from (calls(batch, Worker(devices[0])) for _, batch in first)
        return
    each = min(workers, len(first)) if len(devices) == 1 else 1
    cpus = max(1, default_workers() // len(devices))
    pools, lost = [_new_pool(each, calls, device, cpus) for device in devices], 0

    def submit(number: int, batch: Sequence[Any]) -> _UnderWay:
        return number, batch, _submit(pools[number % len(pools)], batch)

    under_way: deque[_UnderWay] = deque()
    try:
        under_way.extend(submit(*numbered) for numbered in first)
        while under_way:
            _, batch, future = under_way[0]
            try:
                result = future.result()
            except BrokenProcessPool as error:
                if (lost := lost + 1) == LOSSES:
                    raise WorkerLostError(
                        f"{LOSSES} worker processes in a row died while they worked on {calls.label(batch)} or the items after it, often "
                        "for lack of memory: use fewer `workers`, or look for their end in the system's log; then repeat the command"
                    ) from error
                logger.warning(
                    "a worker process died: the work on %s and the items after it is repeated", calls.label(batch)
                )
                _shut_down(pools)
                pools = [_new_pool(each, calls, device, cpus) for device in devices]
                under_way = deque(submit(number, batch) for number, batch, _ in under_way)
                continue
            lost = 0
            under_way.popleft()
            yield result
            under_way.extend(submit(*numbered) for numbered in islice(left, 1))
    finally:
        _shut_down(pools)


_UnderWay = tuple[int, Sequence[Any], Future[Any]]


def _new_pool(workers: int, calls: Calls[Any, Any], device: str | None, cpus: int) -> ProcessPoolExecutor:
    with starting_workers():  # an interrupt between making a semaphore and noting it would leak it
        return ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(calls, device, cpus, in_part())
        )


def _shut_down(pools: Sequence[ProcessPoolExecutor]) -> None:
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: Sequence[Any]) -> Future[Any]:
    try:
        with starting_workers():  # a submit may start one
            return pool.submit(_call, batch)
    except BrokenProcessPool as error:
        lost = Future[Any]()
        lost.set_exception(error)
        return lost


_own: tuple[Calls[Any, Any], Worker] | None = None  # of a worker process


def _begin(calls: Calls[Any, Any], device: str | None, cpus: int, of_part: bool) -> None:
    global _own  # noqa: PLW0603  (a process has one worker)
    _own = calls, Worker(device, cpus)
    begin_process()
    if of_part:
        begin_part()
    if device is None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # there is a process for each processor


def _call(batch: Sequence[Any]) -> Any:  # noqa: ANN401
    calls, worker = cast("tuple[Calls[Any, Any], Worker]", _own)
    return calls(batch, worker)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start worker processes within: Ctrl-C is this process's alone to answer, and the user's script is not run again in each."""
    with _interrupts_deferred(), _main_hidden():
        yield


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Hide the main module from `multiprocessing`: a spawned process would import it, and begin the work of a script without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Answer SIGINT and SIGTERM only afterwards; processes started within never see SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # which is started with the first worker, and would unblock what is blocked here
    caught: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda *arguments: caught.append(arguments)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late, frame in caught[:1]:
            answer = handlers[signal.Signals(late)]
            if callable(answer):
                answer(late, frame)
            elif answer != signal.SIG_IGN:
                signal.raise_signal(late)


def begin_process() -> None:
    """Let a worker of `multiprocessing` show its log as its parent does, and end when its parent does, however that happens."""
    if LEVEL in os.environ:
        show_log(int(os.environ[LEVEL]))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def begin_worker(_: int) -> None:
    """Let a worker of a DataLoader end with its parent: one that hangs in a full pipe to it would not notice.

    Ctrl-C, which all processes of a terminal get, is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_parent_left
    begin_process()


def _report_unless_parent_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of a thread, but not that of the one which hands tensors to a parent that ends at this moment."""
    if not isinstance(error, OSError | EOFError | multiprocessing.AuthenticationError):
        sys.__excepthook__(kind, error, trace)


def as_it_is(batch: Any) -> Any:  # noqa: ANN401  (as DataLoader has it)
    """Return a batch that is made already: what a DataLoader is to collate."""
    return batch


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
