"""Keeping equal rows of a sequence apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

PASSES = 4  # forward and back; the second pair mends what the first left at the edges
LOOKS = 256  # for a row to change places with, per place on average: a pool smaller than the distance would be searched to its end
NEVER = -(1 << 62)


def space_out(
    rows: npt.NDArray[np.int64],
    distance: int,
    before: npt.NDArray[np.int64] | None = None,
    after: npt.NDArray[np.int64] | None = None,
    labels: npt.NDArray[np.int32] | None = None,
) -> npt.NDArray[np.int64]:
    """Reorder a sequence so that equal rows stand at least `distance` apart, where there is room.

    Walk forward: a row that came less than `distance` ago changes places with the nearest later one that may stand here. The same
    walk backward repairs what is then too close at the end. Other rows stay where they are. A single repeated row always finds
    room if its copies times `distance` are at most n; near the limit, (copies - 1) * distance < n, two copies may stay too close.

    Args:
        rows: int64 [n].
        distance: in positions; 1 asks for nothing.
        before: int64 [b], the fixed rows that come just before.
        after: int64 [a], the fixed rows that come just after.
        labels: int32 [n]; if given, places are changed within a label as long as that helps, and only then across labels.

    Returns:
        int64 [n]: the old position of what stands at each new one.
    """
    nothing = np.empty(0, np.int64)
    before, after = (
        nothing if edge is None else edge[-distance:] for edge in (before, None if after is None else after[::-1])
    )
    _, names = np.unique(np.concatenate([rows, before, after]), return_inverse=True)
    names = names.astype(np.int64)
    sequence, before, after = np.split(names, [len(rows), len(rows) + len(before)])
    order = np.arange(len(rows))
    if not _crowded(sequence, distance, before, after, len(names)):
        return order
    groups = np.zeros(len(rows), np.int32) if labels is None else labels.astype(np.int32)
    for within in (True, False) if labels is not None else (False,):
        for attempt in range(PASSES):
            if attempt % 2 == 0:
                _walk(sequence, order, groups, within, distance, before, len(names))
            else:
                _walk(sequence[::-1], order[::-1], groups[::-1], within, distance, after, len(names))
            if not _crowded(sequence, distance, before, after, len(names)):
                return order
    return order


def _crowded(
    sequence: npt.NDArray[np.int64],
    distance: int,
    before: npt.NDArray[np.int64],
    after: npt.NDArray[np.int64],
    names: int,
) -> bool:
    whole = np.concatenate([before, sequence, after[::-1]])
    return bool(_any_near(whole, distance, names))


@jit
def _any_near(sequence: npt.NDArray[np.int64], distance: int, names: int) -> bool:
    last = np.full(names, NEVER, np.int64)
    for at in range(len(sequence)):
        if at - last[sequence[at]] < distance:
            return True
        last[sequence[at]] = at
    return False


@jit
def _walk(
    sequence: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int32],
    within: bool,
    distance: int,
    before: npt.NDArray[np.int64],
    names: int,
) -> None:
    """One walk along the sequence, in place; `before` ends just before position 0."""
    last = np.full(names, NEVER, np.int64)
    for at in range(len(before)):
        last[before[at]] = at - len(before)
    looks = 0
    for at in range(len(sequence)):
        looks += LOOKS
        name = sequence[at]
        if at - last[name] < distance:
            other = max(at + 1, last[name] + distance)
            while other < len(sequence) and looks > 0:
                looks -= 1
                if at - last[sequence[other]] >= distance and (not within or labels[other] == labels[at]):
                    sequence[at], sequence[other] = sequence[other], sequence[at]
                    order[at], order[other] = order[other], order[at]
                    labels[at], labels[other] = labels[other], labels[at]
                    break
                other += 1
        last[sequence[at]] = at
