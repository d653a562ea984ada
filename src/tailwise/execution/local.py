"""The local executor: worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from types import FrameType, ModuleType
from typing import Any, TypeVar

from tailwise.log import LEVEL, show_log

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """The number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_ordered(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """Applies `function` (of a module that workers can import) to each item, and yields the results in the order of the items.

    At most three results a worker are under way or waiting at any time, so that memory is bounded. With one worker, or one item,
    all runs in this process.
    """
    workers = min(workers or default_workers(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with starting_workers():  # an interrupt between making a semaphore and noting it would leak it
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_process)
    try:
        under_way: deque[Future[Result]] = deque()
        for item in items:
            with starting_workers():  # a submit may start one
                under_way.append(pool.submit(function, item))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
    begin_process()


def as_it_is(batch: Any) -> Any:  # noqa: ANN401  (as DataLoader has it)
    """Return a batch that is made already: what a DataLoader is to collate."""
    return batch


def _exit_after(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
