"""Places of equal values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def by_value(values: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each value, ascending, and its places, ascending: int64 [k].

    `values`: integers [n].
    """
    order = np.argsort(values, kind="stable")
    ends = (np.flatnonzero(np.diff(values[order])) + 1).tolist()
    for start, stop in zip([0, *ends], [*ends, len(order)], strict=True):
        if start < stop:
            yield int(values[order[start]]), order[start:stop]
