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

    def __call__(
        self,
        items: Iterable[Item],
        description: str,
        total: int | None = None,
        *,
        size: int = 1,
        unit: str = "",
        later: int = 0,
    ) -> Iterable[Item]:
        """Yield the items of `items`, of which there are `total`.

        Figures are in `unit`, of which an item has `size`. `later` is how often the same work comes again, for the time left for all.
        """
        ...


def silent(items: Iterable[Item], description: str, total: int | None = None, **_: object) -> Iterable[Item]:  # noqa: ARG001
    """Shows nothing."""
    return items


def bars(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    size: int = 1,
    unit: str = "",
    later: int = 0,
) -> Iterator[Item]:
    """Yield the items; show a bar on standard error or, where that is no terminal, log a line a minute."""
    from rich import progress as rich  # noqa: PLC0415  (only the command line draws)
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console, total = Console(stderr=True), total or length_hint(items)

    def figures(done: int, speed: float) -> str:
        texts = [f"{done * size:,}{f' of {total * size:,}' * bool(total)}{f' {unit}' * bool(unit)}"]
        if speed:
            texts.append(f"{_speed(speed * size)}{f' {unit}' * bool(unit)}/s")
        if speed and total:
            left, more = (timedelta(seconds=round(count / speed)) for count in (max(total - done, 0), later * total))
            texts.append(f"{left} left{f', {left + more} for all' * bool(later)}")
        return ", ".join(texts)

    class Figures(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            return Text(figures(int(task.completed), task.speed or 0.0))

    began = logged = time.monotonic()  # without a terminal, no hidden bar: rich before 15 prints an empty line for it
    before = 0  # items at the last line: the speed is that of the last minute
    columns = (rich.TextColumn("{task.description:<28}", markup=False), rich.BarColumn(), Figures())
    with rich.Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext() as bar:
        tracked = bar.track(items, description=plain(description), total=total or None) if bar else items
        for done, item in enumerate(tracked, 1):
            yield item
            now = time.monotonic()
            if not bar and now - logged >= LINE_SECONDS:
                logger.info(f"{description}: {figures(done, (done - before) / (now - logged))}")
                logged, before = now, done
    logger.debug("%s: %.1f s", description, time.monotonic() - began)


def _speed(speed: float) -> str:
    return f"{speed:,.3g}" if speed < 100 else f"{speed:,.0f}"
