"""How fast a remote store answers: what a request costs by itself, and what each byte of it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MEMORY_REQUESTS = 100  # older requests fade out
PRIOR_LATENCY_SECONDS = 0.02  # with these, more requests than needed are made first, rather than too much fetched
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
    """Least squares of seconds = latency + bytes / bandwidth over recent requests, and two made-up ones.

    The made-up ones stand for all while there are none, and fade to what is needed where all requests are alike.

    The bandwidth is that of one connection as it is, with all others busy: a byte that is fetched in vain costs 1 / bandwidth there, a
    request of its own costs the latency there, so that their break-even is `latency × bandwidth` whatever the number of connections.
    """

    _prior_weight: float = 1.0
    _seen: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))

    def observe(self, size_bytes: int, seconds: float) -> None:
        """Takes in one request."""
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
        """Of a request without content."""
        return self._fit()[0]

    @property
    def bytes_per_second(self) -> float:
        """Of one connection."""
        return self._fit()[1]

    @property
    def request_bytes(self) -> float:
        """What could be read in the time that one more request takes."""
        latency, bandwidth = self._fit()
        return latency * bandwidth
