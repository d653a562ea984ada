"""Context of a step: the executor that runs its tasks, and how progress is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tailwise.execution.base import Executor, Needs, Task
from tailwise.execution.local import LocalExecutor
from tailwise.progress import Track, silent

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Context:
    """Context of a step.

    Attributes:
        progress: shows progress.
        executor: runs tasks.
    """

    progress: Track = silent
    executor: Executor = field(default_factory=LocalExecutor)

    def map(
        self, task: Task[Item, Result], items: Sequence[Item], description: str, needs: Needs | None = None
    ) -> Iterator[Result]:
        """Yield the result of each item whose files are not committed, in order; show progress."""
        left = self.executor.left(task, items)
        yield from self.progress(self.executor.map(task, left, needs), description, len(left))

    def run(
        self, task: Task[Item, Result], items: Sequence[Item], description: str, needs: Needs | None = None
    ) -> None:
        """Run a task that writes files over all items."""
        for _ in self.map(task, items, description, needs):
            pass
