"""Progress of long work: steps take a `Track` and wrap what they iterate over in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from operator import length_hint
from typing import Protocol, TypeVar

from tailwise.text import plain

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
LINE_SECONDS = 60.0  # between two lines of the log


class Track(Protocol):
    """Wraps an iterable; shows how far it is."""

    def __call__(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        """Yields the items of `items`, of which there are `total`."""
        ...


def silent(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:  # noqa: ARG001
    """Shows nothing."""
    return items


def bars(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items; show a bar on standard error or, where that is no terminal, log a line a minute."""
    from rich import progress as rich  # noqa: PLC0415  (only the command line draws)
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    class Speed(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            return Text("" if task.speed is None else _speed(task.speed))

    console, total = Console(stderr=True), total or length_hint(items)
    began = logged = time.monotonic()  # without a terminal, no hidden bar: rich before 15 prints an empty line for it
    label = rich.TextColumn("{task.description:<28}", markup=False)
    columns = (label, rich.BarColumn(), rich.MofNCompleteColumn(), Speed(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext() as bar:
        tracked = bar.track(items, description=plain(description), total=total or None) if bar else items
        for done, item in enumerate(tracked, 1):
            yield item
            now = time.monotonic()
            if not bar and now - logged >= LINE_SECONDS:
                logged, speed = now, done / (now - began)
                left = f", {timedelta(seconds=round(max(total - done, 0) / speed))} left" if total else ""
                logger.info(f"{description}: {done:,}{f' of {total:,}' * bool(total)}, {_speed(speed)}{left}")
    logger.debug("%s: %.1f s", description, time.monotonic() - began)


def _speed(speed: float) -> str:
    return f"{speed:,.3g}/s" if speed < 100 else f"{speed:,.0f}/s"
