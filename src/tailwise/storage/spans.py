"""Spans of bytes: sets of them, and which to fetch with one request, by the time that requests take."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]  # [start, stop) bytes
MEMORY_REQUESTS = 100  # older requests lose their weight
PRIOR_LATENCY_SECONDS = 0.02  # with these, the first requests are too many rather than too large
PRIOR_BYTES_PER_SECOND = 12.5e6
PRIOR_MIN_WEIGHT = 0.01  # of a request
_PRIOR_BYTES = 1 << 20
_LATENCIES = (1e-4, 10.0)
_BANDWIDTHS = (1e5, 1e10)


class Spans:
    """An immutable set of spans, which may overlap."""

    def __init__(self, spans: Iterable[Span]) -> None:
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
    """Return pieces, ascending, to be fetched with one request each; each of the wanted spans is within one piece.

    Spans are joined over gaps of up to `gap_bytes`, to pieces of up to `piece_bytes`. No gap with bytes that are `held` is bridged, so
    that nothing is fetched twice.
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


class LinkEstimate:
    """Least squares of seconds = latency + bytes / bandwidth over recent requests and two prior ones.

    The prior ones are needed while there are no requests, and where all requests have the same size; their weight decays.

    The bandwidth is that of one connection while the others are busy. There an unwanted byte costs 1 / bandwidth, and one more request
    costs the latency. So they cost the same at `latency × bandwidth` bytes, whatever the number of connections.
    """

    def __init__(self) -> None:
        self._prior_weight, self._seen = 1.0, np.zeros(5)

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Add one request."""
        kept = 1 - 1 / MEMORY_REQUESTS
        self._seen = self._seen * kept + _moments(size_bytes, seconds)
        self._prior_weight = max(self._prior_weight * kept, PRIOR_MIN_WEIGHT)

    def fit(self) -> tuple[float, float]:
        """Return the latency in seconds, and the bandwidth of one connection in bytes a second."""
        prior = _moments(0, PRIOR_LATENCY_SECONDS)
        prior += _moments(_PRIOR_BYTES, PRIOR_LATENCY_SECONDS + _PRIOR_BYTES / PRIOR_BYTES_PER_SECOND)
        n, x, y, xx, xy = (self._seen + self._prior_weight * prior).tolist()
        slope = (xy - x * y / n) / (xx - x * x / n)
        bandwidth = _PRIOR_BYTES / slope if slope > 0 else _BANDWIDTHS[1]
        bandwidth = min(max(bandwidth, _BANDWIDTHS[0]), _BANDWIDTHS[1])
        latency = (y - x * _PRIOR_BYTES / bandwidth) / n
        return min(max(latency, _LATENCIES[0]), _LATENCIES[1]), bandwidth

    @property
    def request_bytes(self) -> float:
        """Bytes that could be read in the latency of one request."""
        latency, bandwidth = self.fit()
        return latency * bandwidth


def _moments(size_bytes: float, seconds: float) -> npt.NDArray[np.float64]:
    x = size_bytes / _PRIOR_BYTES
    return np.array([1.0, x, seconds, x * x, x * seconds])
