"""Spans of bytes: sets of them, and which to fetch together; and files opened for reading at offsets."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

Span = tuple[int, int]  # [start, stop) bytes


class OpenFile:
    """A descriptor that is closed when it has no more references, so that no thread reads from a number that was reused."""

    __slots__ = ("handle", "touched")

    def __init__(self, path: str | Path) -> None:
        """Open a file for reading."""
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.touched = 0.0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close it; `close` is bound early, since `os` may be gone when the interpreter ends."""
        if self.handle >= 0:
            close(self.handle)


class Spans:
    """An immutable set of spans, which may overlap."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """Take spans in any order."""
        ordered = sorted(spans)
        self._starts = [start for start, _ in ordered]
        self._longest: list[Span] = []  # the span that ends last, of those up to here
        for span in ordered:
            best = self._longest[-1] if self._longest else span
            self._longest.append(span if span[1] >= best[1] else best)

    def find(self, start: int, stop: int) -> Span | None:
        """Return a span that contains [start, stop), or None."""
        at = bisect_right(self._starts, start)
        if at and self._longest[at - 1][1] >= stop:
            return self._longest[at - 1]
        return None

    def meets(self, start: int, stop: int) -> bool:
        """Return whether any span overlaps [start, stop)."""
        at = bisect_left(self._starts, stop)
        return at > 0 and self._longest[at - 1][1] > start


def coalesce(spans: Iterable[Span], gap_bytes: float, piece_bytes: float, held: Spans) -> list[Span]:
    """Return pieces, ascending, to be fetched with one request each; each span is within one piece.

    Args:
        spans: wanted spans, in any order.
        gap_bytes: largest gap between two spans that are joined.
        piece_bytes: largest piece of joined spans.
        held: spans that need no fetching; no gap with any of their bytes is bridged, so that nothing is fetched twice.
    """
    pieces: list[Span] = []
    for start, stop in sorted(spans):
        if pieces:
            first, last = pieces[-1]
            if stop <= last:
                continue
            near = start - last <= gap_bytes and stop - first <= piece_bytes
            if near and (start <= last or not held.meets(last, start)):
                pieces[-1] = (first, stop)
                continue
        pieces.append((start, stop))
    return pieces
