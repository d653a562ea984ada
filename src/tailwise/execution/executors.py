"""Executors by name: one table; and the executor of a part of a map step, one of several processes that share a file system."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

from tailwise.errors import PartDoneError, UserError
from tailwise.execution.base import Executor, Needs, Task
from tailwise.execution.local import LocalExecutor
from tailwise.extras import require
from tailwise.progress import Track, silent
from tailwise.storage.local import begin_part, end_part
from tailwise.text import did_you_mean

Item = TypeVar("Item")
Result = TypeVar("Result")


def parse_part(text: str) -> tuple[int, int]:
    """Return the number of a part, from 1 on, and how many there are, of a text such as 2/8; raise a UserError for another text."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise UserError(f"`part` {text}: give I/N, part I of N, such as 1/8 to 8/8")
    return number, parts


class PartExecutor(LocalExecutor):
    """Run a share of the items of the first map step, then raise a PartDoneError: the command without parts does all else.

    The shares depend on number and count alone, so that a lost part can be run again. Locks of the catalog are shared by all parts from
    here to `close`, and exclude other commands.
    """

    def __init__(self, number: int, parts: int, progress: Track = silent) -> None:
        """Begin part `number`, from 1 on, of `parts`."""
        super().__init__()
        self._number, self._parts, self._progress = number, parts, progress
        self._open: Callable[[], int] = lambda: 0  # the number of items of the step that are not done
        self._left: list[Any] = []
        self._total = 0
        begin_part()

    def close(self) -> None:
        """Share locks no longer."""
        end_part()

    def left(self, task: Task[Item, Any], items: Sequence[Item]) -> list[Item]:
        """Return the items of this part's share that are not done: consecutive ones, which often lie in the same files.

        None of a task that writes no files: only its results would say what is done.
        """
        if items and not task.files(items[0]):
            items = ()
        first, stop = (len(items) * at // self._parts for at in (self._number - 1, self._number))
        shares = [task.left(share) for share in (items[:first], items[first:stop], items[stop:])]
        self._open, self._total = lambda: sum(len(task.left(share)) for share in shares), len(items)
        self._left = shares[1]
        return self._left

    def map(self, task: Task[Item, Result], items: Iterable[Item], needs: Needs | None = None) -> Generator[Result]:
        """Run the items of `left`, and raise a PartDoneError. Work that each part does for itself is run as by other executors."""
        if task.in_each_part:
            return super().map(task, items, needs)
        for _ in self._progress(super().map(task, items, needs) if self._left else (), "items", len(self._left)):
            pass
        raise self._end()

    def reduce(self, *_: object, **__: object) -> Any:  # noqa: ANN401  (it returns nothing)
        """Raise a PartDoneError: one process merges the results of all items."""
        raise self._end()

    def _end(self) -> PartDoneError:
        ran, unfinished = len(self._left), self._open()
        rest = f"{unfinished:,} of {self._total:,} items are left for other parts" if unfinished else "no item is left"
        return PartDoneError(
            f"part {self._number}/{self._parts}: {ran:,} items done; {rest}; when all parts have ended, run the command without `part`",
            unfinished,
        )


def _on_ray(address: str, skip_lost: bool) -> Executor:
    require("ray", "ray", purpose="`executor` ray")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # else Ray reports lost nodes on standard output
    from tailwise.execution.ray import RayExecutor  # noqa: PLC0415  (of an extra)

    return RayExecutor(address, skip_lost=skip_lost)


EXECUTORS: dict[str, Callable[[str, bool], Executor]] = {"local": lambda *_: LocalExecutor(), "ray": _on_ray}


def open_executor(
    name: str = "local",
    ray_address: str = "auto",
    *,
    skip_lost: bool = False,
    part: str | None = None,
    progress: Track = silent,
) -> Executor:
    """Return an executor; the caller closes it.

    Args:
        name: of EXECUTORS.
        ray_address: of the cluster of "ray", see `RayExecutor`.
        skip_lost: of "ray", see `RayExecutor`.
        part: I/N, of "local", see `PartExecutor`; None for all items.
        progress: shows that of a part.

    Raises:
        UserError: the name is unknown, ray is not installed, or there is no cluster.
    """
    check_executor(name)
    if part is not None:
        if name != "local":
            raise UserError(f"`part` {part}: parts are for runs without an engine, and `executor` is {name}")
        return PartExecutor(*parse_part(part), progress)
    return EXECUTORS[name](ray_address, skip_lost)


def check_executor(name: str) -> None:
    """Raise a UserError if the name is unknown."""
    if name not in EXECUTORS:
        raise UserError(f"`executor` {name!r}: {did_you_mean(name, EXECUTORS)}")
