"""Model of the time that a request to a remote store takes: a latency, and a time for each byte."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MEMORY_REQUESTS = 100  # older requests lose their weight
PRIOR_LATENCY_SECONDS = 0.02  # with these, the first requests are too many rather than too large
PRIOR_BYTES_PER_SECOND = 12.5e6
PRIOR_MIN_WEIGHT = 0.01  # of a request
_PRIOR_BYTES = 1 << 20
_LATENCIES = (1e-4, 10.0)
_BANDWIDTHS = (1e5, 1e10)


def _moments(size_bytes: float, seconds: float) -> npt.NDArray[np.float64]:
    x = size_bytes / _PRIOR_BYTES
    return np.array([1.0, x, seconds, x * x, x * seconds])


@dataclass
class LinkEstimate:
    """Least squares of seconds = latency + bytes / bandwidth over recent requests and two prior ones.

    The prior ones are needed while there are no requests, and where all requests have the same size; their weight decays.

    The bandwidth is that of one connection while the others are busy. There an unwanted byte costs 1 / bandwidth, and one more request
    costs the latency. So they cost the same at `latency × bandwidth` bytes, whatever the number of connections.
    """

    _prior_weight: float = 1.0
    _seen: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Add one request."""
        kept = 1 - 1 / MEMORY_REQUESTS
        self._seen = self._seen * kept + _moments(size_bytes, seconds)
        self._prior_weight = max(self._prior_weight * kept, PRIOR_MIN_WEIGHT)

    def _fit(self) -> tuple[float, float]:
        prior = _moments(0, PRIOR_LATENCY_SECONDS)
        prior += _moments(_PRIOR_BYTES, PRIOR_LATENCY_SECONDS + _PRIOR_BYTES / PRIOR_BYTES_PER_SECOND)
        n, x, y, xx, xy = (self._seen + self._prior_weight * prior).tolist()
        slope = (xy - x * y / n) / (xx - x * x / n)
        bandwidth = _PRIOR_BYTES / slope if slope > 0 else _BANDWIDTHS[1]
        bandwidth = min(max(bandwidth, _BANDWIDTHS[0]), _BANDWIDTHS[1])
        latency = (y - x * _PRIOR_BYTES / bandwidth) / n
        return min(max(latency, _LATENCIES[0]), _LATENCIES[1]), bandwidth

    @property
    def latency_seconds(self) -> float:
        """Time of a request without content."""
        return self._fit()[0]

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of one connection."""
        return self._fit()[1]

    @property
    def request_bytes(self) -> float:
        """Bytes that could be read in the latency of one request."""
        latency, bandwidth = self._fit()
        return latency * bandwidth
