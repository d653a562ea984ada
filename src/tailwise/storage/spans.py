"""Spans of bytes: which are there, which to fetch together; and files open for reading by offset."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

Span = tuple[int, int]  # [start, stop) bytes


class OpenFile:
    """A descriptor that is closed when nobody refers to it any more, so that no thread reads from a number used anew."""

    __slots__ = ("handle", "touched")

    def __init__(self, path: str | Path) -> None:
        """Opens it for reading.

        Raises:
            OSError: it can't be opened.
        """
        self.handle = -1
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.touched = 0.0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Closes it; `os` may be gone already when the interpreter ends."""
        if self.handle >= 0:
            close(self.handle)


class Spans:
    """An immutable set of spans, which may overlap; finds one that contains a given one."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """Takes them in any order."""
        ordered = sorted(spans)
        self._starts = [start for start, _ in ordered]
        self._longest: list[Span] = []  # of the spans up to here, the one that ends last
        for span in ordered:
            best = self._longest[-1] if self._longest else span
            self._longest.append(span if span[1] >= best[1] else best)

    def find(self, start: int, stop: int) -> Span | None:
        """A span that contains [start, stop), or None."""
        at = bisect_right(self._starts, start)
        if at and self._longest[at - 1][1] >= stop:
            return self._longest[at - 1]
        return None

    def meets(self, start: int, stop: int) -> bool:
        """Whether any span has bytes in common with [start, stop)."""
        at = bisect_left(self._starts, stop)
        return at > 0 and self._longest[at - 1][1] > start


def coalesce(spans: Iterable[Span], gap_bytes: float, piece_bytes: float, held: Spans) -> list[Span]:
    """Joins spans into pieces that are fetched with one request each.

    Args:
        spans: what is wanted, in any order; each comes to lie whole within one piece.
        gap_bytes: unwanted bytes between two spans up to which they are joined.
        piece_bytes: a piece grows no longer than this (a longer span stays a piece of its own).
        held: what is there already: no gap over any of it is bridged, so that nothing is fetched twice.

    Returns:
        The pieces, ascending.
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
