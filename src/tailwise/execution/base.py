"""The one way to run work: an executor maps a task over items.

A task is a small frozen dataclass: addresses and settings. An item is a part, a shard, a bucket or a range of rows. Items whose files are
committed are skipped, an item whose worker is lost is repeated, and an error names its item. Results do not depend on the executor: sums
are exact, and results come in the order of the items.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tailwise.catalog.catalog import Part
from tailwise.storage.store_path import looked_up

if TYPE_CHECKING:
    import numpy.typing as npt

    from tailwise.catalog.columns import PartColumn

Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")


def default_workers() -> int:
    """The number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Needs:
    """Resources that one item needs."""

    all_cpus: bool = False  # True for kernels with threads of their own; False for work that uses one processor
    workers: int | None = None  # use at most this number; None: one for each processor
    device: str | None = None  # of `find_devices`, a worker on each device that it means: item i on device i mod n
    results: int = 3  # for each worker, that may be under way or wait


KERNEL = Needs(all_cpus=True)


class Worker:
    """Values that one worker keeps from item to item. A lost worker costs time only."""

    def __init__(self, device: str | None = None, cpus: int | None = None) -> None:
        self.device = device  # name; None if the executor gives it none
        self.cpus = cpus or default_workers()  # number of processors that it may use
        self._kept: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it if the worker does not have it."""
        if key not in self._kept:
            self._kept[key] = make()
        value: Value = self._kept[key]
        return value


class Task(Generic[Item, Result]):
    """Work on one item. Subclasses are frozen dataclasses that can be pickled."""

    in_each_part: ClassVar[bool] = False  # True for work that each part of a run does for itself (see executors.py)

    def files(self, item: Item) -> Sequence[Path]:  # noqa: ARG002
        """Return the files that `run` writes, each atomically. An item is skipped if all of them exist."""
        return ()

    def label(self, item: Item) -> str:
        """Return the name of an item, for errors."""
        return str(item)

    def run(self, item: Item, worker: Worker) -> Result:
        """Return the result of one item."""
        raise NotImplementedError

    def is_done(self, item: Item) -> bool:
        """Return True if the files of an item are committed."""
        files = self.files(item)
        return bool(files) and all(path.exists() for path in files)

    def left(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that are not done; folders of an object store are listed once."""
        files = [self.files(item) for item in items]
        if not any(files):
            return [item for item in items if not self.is_done(item)]
        known = {path: path for path in looked_up([path for paths in files for path in paths])}
        done = [bool(paths) and all(known[path].exists() for path in paths) for paths in files]
        return [item for item, is_done in zip(items, done, strict=True) if not is_done]


@dataclass(frozen=True)
class Apply(Task[Item, Result]):
    """A function as a task."""

    function: Callable[[Item], Result]  # of a module that workers can import, or an instance that can be pickled

    def run(self, item: Item, worker: Worker) -> Result:  # noqa: ARG002
        """Return the function of an item."""
        return self.function(item)


@dataclass(frozen=True, eq=False)
class WithWorker(Task[Item, Result]):
    """A function of an item and its worker as a task."""

    function: Callable[[Item, Worker], Result]  # see `Apply`

    def run(self, item: Item, worker: Worker) -> Result:
        """Return the function of an item."""
        return self.function(item, worker)


@dataclass(frozen=True, eq=False)
class Fill(Task[Part, None]):
    """Write a column: of each part, the values that a function returns."""

    column: PartColumn
    values: Callable[[Part, Worker], npt.NDArray[Any]]  # see `Apply`

    def files(self, item: Part) -> Sequence[Path]:
        """Return the file of a part."""
        return (self.column.path(item),)

    def run(self, item: Part, worker: Worker) -> None:
        """Write the values of a part."""
        self.column.write(item, self.values(item, worker))


@dataclass(frozen=True)
class Calls(Generic[Item, Result]):
    """Runs of a task, over one or more items at a time, that executors give to workers."""

    task: Task[Item, Result]
    combine: Callable[[Result, Result], Result] | None = None  # merges two results; None for one item at a time

    def __call__(self, items: Sequence[Item], worker: Worker) -> Result:
        """Return the merged results of some items; what the task raises has a note that names the item."""
        results = (self._run(item, worker) for item in items)
        return next(results) if self.combine is None else functools.reduce(self.combine, results)

    def _run(self, item: Item, worker: Worker) -> Result:
        try:
            return self.task.run(item, worker)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11 and later
                error.add_note(f"{type(self.task).__name__.strip('_')}: {self.task.label(item)}")
            raise

    def label(self, items: Sequence[Item]) -> str:
        """Return the names of some items."""
        return ", ".join(map(self.task.label, items))


def split(items: Sequence[Item], slots: int) -> list[Sequence[Item]]:
    """Return the batches of a reduce: about four for each slot, of consecutive items."""
    size = -(-len(items) // (4 * slots))
    return [items[start : start + size] for start in range(0, len(items), size)]


class Executor(ABC):
    """Runs tasks."""

    @abstractmethod
    def slots(self, needs: Needs) -> int:
        """Return how many items run at the same time."""

    @abstractmethod
    def forget(self) -> None:
        """Let workers drop what they keep from item to item."""

    def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """End the workers."""

    @abstractmethod
    def _run(self, calls: Calls[Any, Any], batches: Iterable[Sequence[Any]], needs: Needs) -> Generator[Any]:
        """Yield the result of each batch of items, in order. At most a few results per slot wait at any time."""

    def left(self, task: Task[Item, Any], items: Sequence[Item]) -> list[Item]:
        """Return the items whose files are not committed."""
        return task.left(items)

    def map(self, task: Task[Item, Result], items: Iterable[Item], needs: Needs | None = None) -> Generator[Result]:
        """Yield the result of each item, in order."""
        return self._run(Calls(task), ([item] for item in items), needs or Needs())

    def reduce(
        self,
        task: Task[Item, Result],
        items: Sequence[Item],
        combine: Callable[[Result, Result], Result],
        needs: Needs | None = None,
    ) -> Result:
        """Return the merged results of at least one item; workers merge theirs before the driver merges those of the workers.

        `combine` is exact, in any order.
        """
        needs = needs or Needs()
        batches = split(items, self.slots(needs))
        merged: Result = functools.reduce(combine, self._run(Calls(task, combine), batches, needs))
        return merged
