"""Progress of long work: stages take a `Track` and wrap what they iterate over in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from tailwise.text import plain

Item = TypeVar("Item")


class Track(Protocol):
    """Wraps an iterable; shows how far it is."""

    def __call__(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        """Yields the items of `items`, of which there are `total`."""
        ...


def silent(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:  # noqa: ARG001
    """Shows nothing."""
    return items


def bars(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """A progress bar with items a second and the time left on standard error, where that is a terminal."""
    from rich.console import Console  # noqa: PLC0415  (only the command line draws)
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text  # noqa: PLC0415

    class Speed(ProgressColumn):
        """Items a second."""

        def render(self, task: Task) -> Text:
            """One line."""
            return Text(
                "" if task.speed is None else f"{task.speed:,.3g}/s" if task.speed < 100 else f"{task.speed:,.0f}/s"
            )

    console = Console(stderr=True)
    label = TextColumn("{task.description:<28}", markup=False)
    columns = (label, BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(items, description=plain(description), total=total)
