"""Compiled loops that decide which column, or which earlier row, is nearest, from screening scores (see screening.py) and exact products.

All of them stand in this file since they call each other. Inner products of grid rows are exact in any order (see grid.py), and maxima are
indifferent to it, so that reordering float operations changes nothing.

r: row; k: column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit_any_order

TILE = 1024  # memory for scores has whole tiles: 16 groups of 64 columns, k ≡ g, whose greatest scores are known before any is examined
UP = np.float32(2.0**-20)  # added to a bound that was rounded to float32
FAR = np.float32(-8)  # below every score
KEPT, DROPPED, OPEN = np.uint8(0), np.uint8(1), np.uint8(2)  # fates of rows under dedup's greedy rule

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int32]


@jit_any_order
def inner_product(x: Floats, row: int, columns: Floats, column: int) -> float:
    """Exact, for rows on the grid."""
    total = 0.0
    for axis in range(x.shape[1]):
        total += np.float64(x[row, axis]) * np.float64(columns[column, axis])
    return total


@jit_any_order
def _cosine(x: Floats, norms: Doubles, row: int, other: int) -> float:
    """The exact inner product of two rows over their norms."""
    return float(inner_product(x, row, x, other) / (norms[row] * norms[other]))


@jit_any_order
def _room_for(count: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Memory for a row's scores; for the greatest of each 4; for the greatest of each 16, a group; for the greatest of each 4 groups."""
    size = max(1, -(-count // TILE)) * TILE
    quarter = size // 4
    return (
        np.full(size, FAR),
        np.empty(quarter, np.float32),
        np.empty(size // 16, np.float32),
        np.empty(size // 64, np.float32),
    )


@jit_any_order
def _fold(values: Floats, out: Floats) -> None:
    """The greatest of values at, at + q, at + 2 q and at + 3 q, q being a quarter of their number: [q]."""
    quarter = len(values) // 4
    first, second = values[:quarter], values[quarter : 2 * quarter]
    third, fourth = values[2 * quarter : 3 * quarter], values[3 * quarter :]
    for at in range(quarter):  # comparisons, which become vector instructions where `max` doesn't
        low = first[at] if first[at] > second[at] else second[at]
        high = third[at] if third[at] > fourth[at] else fourth[at]
        out[at] = low if low > high else high


@jit_any_order
def _scores(
    products: npt.NDArray[Any],
    row_scale: np.float32,
    scale: Floats,
    bias: Floats,
    scores: Floats,
    fours: Floats,
    tops: Floats,
    last: Floats,
) -> np.float32:
    """Fills memory of `_room_for` as many columns, or more, with a row's scores; the greatest of all."""
    for at in range(len(scale)):
        scores[at] = np.float32(products[at]) * (row_scale * scale[at]) + bias[at]
    return _top(scores, fours, tops, last)


@jit_any_order
def _top(scores: Floats, fours: Floats, tops: Floats, last: Floats) -> np.float32:
    """Fills the rest of a row's memory from its scores; the greatest of all."""
    _fold(scores, fours)
    _fold(fours, tops)
    _fold(tops, last)
    even, odd = last[0], last[1]  # two chains of comparisons, side by side
    for at in range(2, len(last), 2):
        even = last[at] if last[at] > even else even
        odd = last[at + 1] if last[at + 1] > odd else odd
    top: np.float32 = even if even > odd else odd
    return top


@jit_any_order
def _column_of_top(scores: Floats, tops: Floats, top: np.float32) -> int:
    """A column whose score is the greatest of all."""
    groups = len(tops)
    group = 0
    while tops[group] < top and group + 1 < groups:
        group += 1
    column = group
    while scores[column] < top and column + groups < len(scores):
        column += groups
    return column


@jit_any_order
def _decide_row(
    row: int,
    scores: Floats,
    tops: Floats,
    top: np.float32,
    shift: float,
    error: np.float32,
    x: Floats,
    columns: Floats,
    first: int,
    labels: Labels,
    dots: Doubles,
) -> bool:
    """Updates a row's nearest column, and the exact inner product with it; False if a score is too far off."""
    floor = np.float32(dots[row] - shift) - error - UP
    if top < floor:
        return True
    seen = _column_of_top(scores, tops, top)  # the top first: a good best makes for few candidates
    dot = inner_product(x, row, columns, first + seen)
    if abs(dot - shift - top) > error:
        return False
    if dot > dots[row] or (dot == dots[row] and first + seen < labels[row]):
        dots[row], labels[row] = dot, first + seen
        floor = np.float32(dot - shift) - error - UP
    for group in range(len(tops)):
        if tops[group] < floor:
            continue
        for at in range(group, len(scores), len(tops)):
            if scores[at] < floor or at == seen:
                continue
            dot = inner_product(x, row, columns, first + at)
            if abs(dot - shift - scores[at]) > error:
                return False
            if dot > dots[row] or (dot == dots[row] and first + at < labels[row]):
                dots[row], labels[row] = dot, first + at
                floor = max(floor, np.float32(dot - shift) - error - UP)
    return True


@jit_any_order
def decide(
    products: npt.NDArray[Any],
    row_scale: Floats,
    shift: Doubles,
    error: Floats,
    scale: Floats,
    bias: Floats,
    x: Floats,
    columns: Floats,
    first: int,
    labels: Labels,
    dots: Doubles,
) -> bool:
    """Updates nearest columns and exact inner products with columns first, first + 1, …; False if a score is too far off."""
    scores, fours, tops, last = _room_for(len(scale))
    for row in range(len(row_scale)):
        top = _scores(products[row], row_scale[row], scale, bias, scores, fours, tops, last)
        if not _decide_row(row, scores, tops, top, shift[row], error[row], x, columns, first, labels, dots):
            return False
    return True


@jit_any_order
def raise_to_greatest(
    products: npt.NDArray[Any],
    row_scale: Floats,
    shift: Doubles,
    error: Floats,
    scale: Floats,
    bias: Floats,
    x: Floats,
    columns: Floats,
    inverse: Doubles,
    first: int,
    greatest: Doubles,
) -> bool:
    """Raises `greatest` to |exact inner product| · inverse[k] with columns first, first + 1, …; False if a score is too far off.

    The columns were scaled by `inverse` before they were coded.
    """
    scores, fours, tops, last = _room_for(len(scale))
    for row in range(len(row_scale)):
        own_scale, own_shift = row_scale[row], np.float32(shift[row])
        for at in range(len(scale)):
            scores[at] = abs(np.float32(products[row, at]) * (own_scale * scale[at]) + (bias[at] + own_shift))
        top = _top(scores, fours, tops, last)
        floor = np.float32(greatest[row]) - error[row] - UP
        if top < floor:
            continue
        seen = _column_of_top(scores, tops, top)  # the top first: a good best makes for few candidates
        found = abs(inner_product(x, row, columns, first + seen)) * inverse[first + seen]
        if abs(found - top) > error[row] + UP:
            return False
        greatest[row] = max(greatest[row], found)
        floor = np.float32(greatest[row]) - error[row] - UP
        for group in range(len(tops)):
            if tops[group] < floor:
                continue
            for at in range(group, len(scale), len(tops)):
                if scores[at] < floor or at == seen:
                    continue
                found = abs(inner_product(x, row, columns, first + at)) * inverse[first + at]
                if abs(found - scores[at]) > error[row] + UP:
                    return False
                greatest[row] = max(greatest[row], found)
    return True


@jit_any_order
def decide_and_list(
    products: npt.NDArray[Any],
    row_scale: Floats,
    shift: Doubles,
    error: Floats,
    scale: Floats,
    bias: Floats,
    x: Floats,
    columns: Floats,
    first: int,
    labels: Labels,
    dots: Doubles,
    window: np.float32,
    listed: Labels,
    near: Labels,
    near_bound: Floats,
    rest: Floats,
) -> bool:
    """Do the work of `decide`, and list near columns.

    `near` gets columns whose score is within `window` of the best, at most as many as it has slots, `listed` of them; `near_bound` an upper
    bound on the inner product of each, and `rest` one on that of all columns that aren't listed.
    """
    count, slots = len(scale), near.shape[1]
    scores, fours, tops, last = _room_for(count)
    quarter = len(fours)
    high, found, good = np.empty(quarter + 1, np.int32), np.empty(count + 1, np.int32), np.empty(count + 1, np.float32)
    for row in range(len(row_scale)):
        top = _scores(products[row], row_scale[row], scale, bias, scores, fours, tops, last)
        if not _decide_row(row, scores, tops, top, shift[row], error[row], x, columns, first, labels, dots):
            return False
        above = error[row] + np.float32(shift[row]) + UP  # of bounds above scores
        look = np.float32(dots[row] - shift[row]) - max(error[row], window) - UP
        if top < look:
            rest[row] = max(rest[row], top + above)
            continue
        if _reaching(fours, look) > slots:  # too many already: look from higher up
            look = _threshold(fours, slots, look, top)
        fitting = size = 0  # no branch, which would be guessed wrong too often
        for four in range(quarter):
            high[fitting] = four
            fitting += fours[four] >= look
        for place in range(fitting):
            for at in range(high[place], 4 * quarter, quarter):
                found[size], good[size] = at, scores[at]
                size += scores[at] >= look
        if size > slots:
            look = _threshold(good[:size], slots, look, top)
        rest[row] = max(rest[row], look + above)
        free = listed[row]
        for place in range(size):
            if good[place] < look:
                continue
            if free < slots:
                near[row, free], near_bound[row, free] = first + found[place], good[place] + above
                free += 1
                listed[row] = free
            else:
                _list(listed, near, near_bound, rest, row, first + found[place], good[place] + above)
    return True


@jit_any_order
def _reaching(scores: Floats, low: np.float32) -> int:
    """How many scores are as high as that, or higher."""
    count = np.int32(0)
    for at in range(len(scores)):
        count += np.int32(scores[at] >= low)
    return int(count)


@jit_any_order
def _threshold(scores: Floats, most: int, low: np.float32, high: np.float32) -> np.float32:
    """Return about the lowest value that at most `most` scores reach; `high` if more scores are as high as `high`."""
    for _ in range(6):
        middle = np.float32(0.5) * (low + high)
        if _reaching(scores, middle) > most:
            low = middle
        else:
            high = middle
    return high


@jit_any_order
def _list(
    listed: Labels, near: Labels, near_bound: Floats, rest: Floats, row: int, column: int, bound: np.float32
) -> None:
    """Puts a column on a row's list, in place of the one of least bound if it is full."""
    free, slots = listed[row], near.shape[1]
    if free < slots:
        near[row, free], near_bound[row, free] = column, bound
        listed[row] += 1
        return
    least = bound
    for slot in range(slots):
        least = min(least, near_bound[row, slot])
    rest[row] = max(rest[row], least)
    if bound > least:
        slot = 0
        while near_bound[row, slot] > least and slot + 1 < slots:
            slot += 1
        near[row, slot], near_bound[row, slot] = column, bound


@jit_any_order
def recheck(
    x: Floats,
    columns: Floats,
    drift: Floats,
    others: np.float32,
    labels: Labels,
    dots: Doubles,
    listed: Labels,
    near: Labels,
    near_bound: Floats,
    rest: Floats,
) -> None:
    """Finds the nearest of each row's listed columns after the columns have moved by `drift`, and the others by no more than `others`.

    The bounds follow; a row's nearest column is certainly among the listed ones if its inner product is above `rest`.
    """
    for row in range(x.shape[0]):
        own = labels[row]
        if own < 0:
            continue
        own_dot = best = inner_product(x, row, columns, own)
        rest[row] = rest[row] + others + UP
        for slot in range(listed[row]):
            column = near[row, slot]
            if column == own:
                near_bound[row, slot] = np.float32(own_dot) + UP
                continue
            bound = near_bound[row, slot] + drift[column] + UP
            if bound >= best:
                dot = inner_product(x, row, columns, column)
                bound = np.float32(dot) + UP
                if dot > best or (dot == best and column < labels[row]):
                    best, labels[row] = dot, column
            near_bound[row, slot] = bound
        dots[row] = best


@jit_any_order
def decide_movers(
    products: npt.NDArray[Any],
    row_scale: Floats,
    shift: Doubles,
    error: Floats,
    scale: Floats,
    bias: Floats,
    x: Floats,
    columns: Floats,
    movers: Labels,
    labels: Labels,
    dots: Doubles,
    listed: Labels,
    near: Labels,
    near_bound: Floats,
    rest: Floats,
) -> bool:
    """Do the work of `recheck` for columns `movers`, which moved further than it took into account; False as for `decide`."""
    count = len(scale)
    scores, fours, tops, last = _room_for(count)
    for row in range(len(row_scale)):
        if labels[row] < 0:
            continue
        top = _scores(products[row], row_scale[row], scale, bias, scores, fours, tops, last)
        look = np.float32(min(np.float64(rest[row]), dots[row]) - shift[row]) - error[row] - 2 * UP
        if top < look:
            continue
        for group in range(len(tops)):
            if tops[group] < look:
                continue
            for at in range(group, count, len(tops)):
                score = scores[at]
                if score < look:
                    continue
                column = movers[at]
                known = False
                for slot in range(listed[row]):
                    known |= near[row, slot] == column
                if known:
                    continue
                bound = np.float32(score + error[row] + shift[row]) + UP
                if bound >= dots[row]:
                    dot = inner_product(x, row, columns, column)
                    if abs(dot - shift[row] - score) > error[row]:
                        return False
                    bound = np.float32(dot) + UP
                    if dot > dots[row] or (dot == dots[row] and column < labels[row]):
                        dots[row], labels[row] = dot, column
                _list(listed, near, near_bound, rest, row, column, bound)
    return True


@jit_any_order
def decide_earlier(
    products: npt.NDArray[Any],
    row_scale: Floats,
    shift: Doubles,
    error: Floats,
    scale: Floats,
    bias: Floats,
    x: Floats,
    norms: Doubles,
    first_row: int,
    first_column: int,
    greatest: float,
    similarity: Doubles,
    earlier: npt.NDArray[np.int64],
) -> bool:
    """Updates the most similar earlier row, and the cosine to it, of rows first_row, … with rows first_column, …; False as for `decide`.

    Cosines are exact inner products over the product of the norms, but at most `greatest`; ties go to the earliest row.
    """
    scores, fours, tops, last = _room_for(len(scale))
    for at in range(len(row_scale)):
        row = first_row + at
        count = min(len(scale), row - first_column)
        if count <= 0:
            continue
        # No row before had more, so what follows in `scores` is still FAR.
        top = _scores(products[at], row_scale[at], scale[:count], bias, scores, fours, tops, last)
        floor = np.float32(similarity[row] - shift[at]) - error[at] - UP
        if top < floor:
            continue
        # The top first: a good best makes for few candidates.
        other = first_column + _column_of_top(scores, tops, top)
        cosine = _cosine(x, norms, row, other)
        if abs(cosine - shift[at] - top) > error[at]:
            return False
        floor = max(floor, np.float32(min(cosine, greatest) - shift[at]) - error[at] - UP)
        for group in range(len(tops)):
            if tops[group] < floor:
                continue
            for column in range(group, count, len(tops)):
                score = scores[column]
                if score < floor:
                    continue
                other = first_column + column
                cosine = _cosine(x, norms, row, other)
                if abs(cosine - shift[at] - score) > error[at]:
                    return False
                cosine = min(cosine, greatest)
                if cosine > similarity[row] or (cosine == similarity[row] and other < earlier[row]):
                    similarity[row], earlier[row] = cosine, other
                    floor = max(floor, np.float32(cosine - shift[at]) - error[at] - UP)
    return True


@jit_any_order
def decide_pairs(
    rows: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    scores: Floats,
    x: Floats,
    norms: Doubles,
    error: float,
    greatest: float,
    similarity: Doubles,
    earlier: npt.NDArray[np.int64],
) -> bool:
    """Do the work of `decide_earlier` for candidate pairs in order of rows and others."""
    for at in range(len(rows)):
        row, other = rows[at], others[at]
        cosine = _cosine(x, norms, row, other)
        if abs(cosine - scores[at]) > error:
            return False
        cosine = min(cosine, greatest)
        if cosine > similarity[row]:
            similarity[row], earlier[row] = cosine, other
    return True


@jit_any_order
def decide_back(
    asked: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    scores: Floats,
    x: Floats,
    norms: Doubles,
    error: float,
    greatest: float,
    threshold: float,
    alone: bool,
    status: npt.NDArray[np.uint8],
    waits: npt.NDArray[np.bool_],
    kept_row: npt.NDArray[np.int64],
    found: Doubles,
) -> bool:
    """Do the work of `duplicates.look_back`, for candidate pairs others[offsets[a]:offsets[a + 1]]; False if a score is too far off."""
    for at in range(len(asked)):
        row, best = asked[at], threshold
        for place in range(offsets[at], offsets[at + 1]):
            other = others[place]
            if other >= row or status[other] == DROPPED:
                continue
            exact = _cosine(x, norms, row, other)
            if abs(exact - scores[place]) > error:
                return False
            exact = 1.0 if _identical(x, row, other) else min(exact, greatest)
            if exact > threshold and status[other] == OPEN:
                waits[at] = True
            elif exact > best:
                best, kept_row[at], found[at] = exact, other, exact
        if kept_row[at] >= 0:
            status[row] = DROPPED
        elif alone and not waits[at]:
            status[row] = KEPT
    return True


@jit_any_order
def _identical(x: Floats, row: int, other: int) -> bool:
    axis = 0
    while axis < x.shape[1] and x[row, axis] == x[other, axis]:
        axis += 1
    return bool(axis == x.shape[1])
