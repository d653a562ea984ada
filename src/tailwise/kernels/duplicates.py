"""Near-duplicates among the members of one cluster, exactly (SemDeDup, arXiv 2303.09540).

The similarity of two rows is the cosine of their float16 embeddings: the exact dot product over the product of the exact norms,
in float64 (see grid.py). Approximate products of normalised rows screen within their error bound (see screening.py); the exact similarity
decides, so that results don't depend on threads, tiles or devices.

Similarity 1 means identical, and nothing else does: rows that differ have at most BELOW_ONE. Identical rows have the same
similarity to every other row, so that only the first of them need be compared; a clique of n identical rows costs n, not n².

m: members of the cluster, in keep-order; d: dimension.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import resolve_device
from tailwise.kernels.grid import as_rows, row_norms, to_grid
from tailwise.kernels.jit import jit, jit_any_order
from tailwise.kernels.nearest import decide_earlier
from tailwise.kernels.screening import IMPRECISE, Coded, Screen, float32_error, full_precision, scratch_for
from tailwise.kernels.threads import run_tiles

BELOW_ONE = float(np.nextafter(1.0, 0.0))
NOTHING_EARLIER = -np.inf  # the similarity of a row without an earlier one
TILE_ROWS = 512  # of scores
TILE_COLUMNS = 1024
CENTRE_ROWS = 256  # whose mean serves as the centre of all
SMALL = 4096  # members of a cluster that one thread does best, and rows that are coded at a time
DEVICE_ROWS = 512
DEVICE_COLUMNS = 4096
SCAN_SCORES = 1 << 21  # scores at a time, in the greedy rule's second look
EXACT_PAIRS = 1 << 13  # similarities at a time, of pairs between two sets of rows

_NONE = -4.0  # below every similarity


def duplicate_threshold(epsilon: float) -> float:
    """Two rows are duplicates if their similarity is above this: above 1 − ε, or 1 (identical)."""
    return min(1.0 - epsilon, BELOW_ONE)


# --- identical rows -----------------------------------------------------------------------------------------------------

_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x00000100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_MINUS_ZERO = np.uint16(0x8000)  # the bits of −0, which equals 0


@jit
def _hash_words(words: npt.NDArray[np.unsignedinteger[Any]], hashes: npt.NDArray[np.uint64]) -> None:
    """FNV-1a over words of whatever width, mixed so that the low bits depend on all."""
    for row in range(words.shape[0]):
        value = _OFFSET
        for axis in range(words.shape[1]):
            value = (value ^ np.uint64(words[row, axis])) * _PRIME
        value = (value ^ (value >> _HALF)) * _GOLDEN
        hashes[row] = value ^ (value >> _HALF)


@jit
def _first_of_identical(
    words: npt.NDArray[np.unsignedinteger[Any]],
    hashes: npt.NDArray[np.uint64],
    table: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
) -> None:
    """Fills `first` with the help of a hash table, all −1, whose length is a power of two above the number of rows."""
    last = len(table) - 1
    for row in range(len(first)):
        slot = np.int64(hashes[row] & np.uint64(last))
        first[row] = row
        while table[slot] >= 0:
            other = table[slot]
            if hashes[other] == hashes[row] and np.array_equal(words[other], words[row]):
                first[row] = other
                break
            slot = (slot + 1) & last
        if first[row] == row:
            table[slot] = row


def first_of_identical(x: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    """The first row that equals each row of x [m, d], in expected linear time: int64 [m]."""
    bits = np.ascontiguousarray(x).view(np.uint16)
    if (minus := bits == _MINUS_ZERO).any():
        bits = np.where(minus, np.uint16(0), bits)
    words = bits.view(np.uint64 if x.shape[1] % 4 == 0 else np.uint16)
    hashes = np.empty(len(x), np.uint64)
    _hash_words(words, hashes)
    first = np.empty(len(x), np.int64)
    table = np.full(1 << (2 * len(x)).bit_length(), -1, np.int64)
    _first_of_identical(words, hashes, table, first)
    return first


# --- the most similar earlier row ---------------------------------------------------------------------------------------


@jit_any_order  # dot products of grid rows are exact in any order
def _cosine(x: npt.NDArray[np.float32], norms: npt.NDArray[np.float64], row: int, other: int) -> float:
    """The exact dot product of two rows over their norms."""
    dot = 0.0
    for axis in range(x.shape[1]):
        dot += np.float64(x[row, axis]) * np.float64(x[other, axis])
    return float(dot / (norms[row] * norms[other]))


@jit_any_order  # as above
def _resolve_pairs(
    rows: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    x: npt.NDArray[np.float32],
    norms: npt.NDArray[np.float64],
    error: float,
    best: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
) -> bool:
    """The same for candidate pairs, ordered by row and other."""
    for at in range(len(rows)):
        row, other = rows[at], others[at]
        similarity = _cosine(x, norms, row, other)
        if abs(similarity - scores[at]) > error:
            return False
        similarity = min(similarity, BELOW_ONE)
        if similarity > best[row]:
            best[row] = similarity
            earlier[row] = other
    return True


class _Rows:
    """Rows where the matrix products run, and on the grid where exact similarities are taken."""

    def __init__(self, x: npt.NDArray[np.float16], device: str) -> None:
        self.x = torch.from_numpy(np.ascontiguousarray(x)).float().numpy()  # float16 lies on the grid
        self.norms = row_norms(self.x)
        _refuse_zeros(self.norms)
        self.error = float32_error(x.shape[1] + 2)  # unit rows are rounded twice
        self.device = torch.device(resolve_device(device))
        unit = self.x / self.norms.astype(np.float32)[:, None]
        self.unit = torch.from_numpy(unit).to(self.device)

    def scores(self, rows: slice | torch.Tensor, columns: slice, scratch: torch.Tensor) -> torch.Tensor:
        """Approximate similarities [rows, columns], in the memory of `scratch`."""
        left, right = self.unit[rows], self.unit[columns]
        out = scratch[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=out)


def _refuse_zeros(norms: npt.NDArray[np.float64]) -> None:
    if not norms.all():
        raise ValueError(f"row {int(np.flatnonzero(norms == 0)[0])} is zero: it has no similarity to any other")


def most_similar_earlier(
    x: npt.NDArray[np.float16], *, judged_from: int = 0, device: str = "auto", threads: int | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The most similar earlier row of each row, and the similarity to it; ties go to the earliest.

    Args:
        x: [m, d], unit norm, in keep-order.
        judged_from: rows before this one are compared with, not judged.
        device: of the matrix products; the result doesn't depend on it.
        threads: on the CPU; None for torch's number; the result doesn't depend on it.

    Returns:
        similarity: float64 [m]; 1 if the earlier row is identical, NOTHING_EARLIER where there is none, and before judged_from.
        earlier: int64 [m], the row's index; −1 where there is none.

    Raises:
        ValueError: a row isn't of unit norm.
        ArithmeticError: matrix products are less precise than they should be.
    """
    first = first_of_identical(x)
    distinct = np.flatnonzero(first == np.arange(len(x)))
    start = int(np.searchsorted(distinct, judged_from))
    unlike = x if len(distinct) == len(x) else x[distinct]
    if not len(distinct):
        best, at = np.empty(0), np.empty(0, np.int64)
    elif resolve_device(device) == "cpu":
        best, at = _most_similar_on_cpu(unlike, start, threads or torch.get_num_threads())
    else:
        best, at = _most_similar_on_device(_Rows(unlike, device), start)
    similarity, earlier = np.full(len(x), NOTHING_EARLIER), np.full(len(x), -1, np.int64)
    found = np.flatnonzero(at >= 0)
    similarity[distinct[found]], earlier[distinct[found]] = best[found], distinct[at[found]]
    copies = np.flatnonzero(first < np.arange(len(x)))
    copies = copies[copies >= judged_from]
    similarity[copies], earlier[copies] = 1.0, first[copies]
    return similarity, earlier


def _most_similar_on_cpu(
    x: npt.NDArray[np.float16], start: int, threads: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    count = len(x)
    rows, norms = np.empty(x.shape, np.float32), np.empty(count)
    best, earlier = np.full(count, _NONE), np.full(count, -1, np.int64)
    small = count <= SMALL
    height = TILE_ROWS // 2 if small else TILE_ROWS  # half a tile of rows is compared with later rows in vain
    screen = Screen(to_grid(to_grid(x[:CENTRE_ROWS]).mean(axis=0, dtype=np.float64)))
    codes = Coded.memory_for(count, x.shape[1], screen.precision)

    def code(first: int, _: None) -> None:
        tile = slice(first, min(first + SMALL, count))
        rows[tile] = to_grid(x[tile])
        norms[tile] = row_norms(rows[tile], first=first)
        codes.put(tile, screen.rows(rows[tile], (1 / np.maximum(norms[tile], 0.5)).astype(np.float32)))

    def compare(first_row: int, scratch: torch.Tensor) -> None:
        stop = min(first_row + height, count)
        for first_column in range(0, stop, TILE_COLUMNS):
            some = columns[first_column : min(first_column + TILE_COLUMNS, stop)]
            scores = screen.scores(codes[first_row:stop], some, scratch)
            if not decide_earlier(*scores, rows, norms, first_row, first_column, BELOW_ONE, best, earlier):
                raise ArithmeticError(IMPRECISE)

    run_tiles(code, range(0, count, SMALL), threads, lambda: None)
    _refuse_zeros(norms)
    columns = screen.as_columns(codes)
    with full_precision():
        tiles = range(start, count, height)
        size = min(height, count), min(TILE_COLUMNS, count)
        run_tiles(compare, tiles[::-1], threads, lambda: scratch_for(screen.precision, *size))
    return best, earlier


def _most_similar_on_device(rows: _Rows, start: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    count = len(rows.x)
    best, earlier = np.full(count, _NONE), np.full(count, -1, np.int64)
    scratch = torch.empty(min(DEVICE_ROWS, count) * min(DEVICE_COLUMNS, count), device=rows.device)
    with full_precision():
        for first_row in range(start, count, DEVICE_ROWS):
            last_row = min(first_row + DEVICE_ROWS, count)
            for first_column in range(0, last_row, DEVICE_COLUMNS):
                columns = slice(first_column, min(first_column + DEVICE_COLUMNS, last_row))
                scores = rows.scores(slice(first_row, last_row), columns, scratch)
                _resolve_device(rows, scores, first_row, first_column, best, earlier)
    return best, earlier


def _resolve_device(
    rows: _Rows,
    scores: torch.Tensor,
    first_row: int,
    first_column: int,
    best: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
) -> None:
    """The device finds the candidates, and the CPU decides them."""
    at = torch.arange(len(scores), device=scores.device)[:, None] + (first_row - first_column)
    scores.masked_fill_(torch.arange(scores.shape[1], device=scores.device)[None] >= at, _NONE)
    known = torch.from_numpy(best[first_row : first_row + len(scores)]).to(scores.device)
    floor = torch.maximum(scores.amax(1).double() - 2 * rows.error, known - rows.error).clamp_(min=-2.0)
    pairs = (scores >= floor[:, None]).nonzero(as_tuple=True)
    values = scores[pairs].cpu().numpy()
    row, column = (index.cpu().numpy() for index in pairs)
    if not _resolve_pairs(
        first_row + row, first_column + column, values, rows.x, rows.norms, rows.error, best, earlier
    ):
        raise ArithmeticError(IMPRECISE)


# --- the greedy rule ----------------------------------------------------------------------------------------------------


@jit_any_order  # as above
def _walk(
    start: int,
    stop: int,
    threshold: float,
    judged_from: int,
    similarity: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
    x: npt.NDArray[np.float32],
    norms: npt.NDArray[np.float64],
    place: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    error: float,
    heirs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    kept_row: npt.NDArray[np.int64],
    found: npt.NDArray[np.float64],
) -> bool:
    """Decides rows [start, stop), all earlier ones being decided; False if a score is too far off.

    The candidates of a row in doubt are others[offsets[p]:offsets[p + 1]], p = place[row].
    """
    for row in range(start, stop):
        if similarity[row] <= threshold:  # no earlier one is a duplicate, kept or not
            kept[row] = True
            continue
        other = earlier[row]
        if kept[other]:
            kept_row[row] = other
            found[row] = similarity[row]
            continue
        if similarity[row] == 1.0:  # shares the fate of the first judged row that is identical
            first = other if other >= judged_from else heirs[other]
            if first >= 0:
                kept_row[row] = first if kept[first] else kept_row[first]
                found[row] = 1.0 if kept[first] else found[first]
                continue
            heirs[other] = row
        best = threshold
        p = place[row]
        for at in range(offsets[p], offsets[p + 1]):
            other = others[at]
            if other < row and kept[other]:
                exact = _cosine(x, norms, row, other)
                if abs(exact - scores[at]) > error:
                    return False
                exact = min(exact, BELOW_ONE)
                if exact > best:
                    best = exact
                    kept_row[row] = other
                    found[row] = exact
        kept[row] = kept_row[row] < 0
    return True


def in_doubt(
    similarity: npt.NDArray[np.float64],
    threshold: float,
    judged: npt.NDArray[np.bool_],
    certain: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    """Rows that the most similar earlier row alone doesn't decide under the greedy rule: bool [n].

    A row goes if its most similar earlier row is kept, stays if that is no duplicate, and shares its fate if they are identical.

    Args:
        similarity: [n], to the most similar earlier row.
        threshold: of duplicates.
        judged: [n], whether that earlier row is itself judged (rather than decided before).
        certain: [n], whether that earlier row is certainly kept.
    """
    doubtful: npt.NDArray[np.bool_] = (similarity > threshold) & ~certain & ~((similarity == 1.0) & judged)
    return doubtful


def greedy(
    x: npt.NDArray[np.float16],
    similarity: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
    threshold: float,
    *,
    kept_before: npt.NDArray[np.bool_] | None = None,
    device: str = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Drops each row that is a duplicate of an earlier row that is kept.

    Only rows that `similarity` and `earlier` leave in doubt are compared again.

    Args:
        x: [m, d], in keep-order.
        similarity: float64 [m], from most_similar_earlier with judged_from = len(kept_before).
        earlier: int64 [m], from there too.
        threshold: rows of a similarity above it are duplicates.
        kept_before: of the rows that are decided already, which come first, kept ones before dropped ones: whether they are kept.
        device: of the matrix products; the result doesn't depend on it.

    Returns:
        kept_row: int64 [m], the most similar kept earlier row of each row that is dropped now, else −1. A row that is identical to
            a dropped one has that one's.
        similarity: float64 [m], to it; NOTHING_EARLIER where there is none.

    Raises:
        ArithmeticError: matrix products are less precise than they should be.
    """
    count, judged_from = len(x), 0 if kept_before is None else len(kept_before)
    similarity = np.maximum(similarity, _NONE)  # compiled loops that may reorder must not meet infinities
    kept = np.zeros(count, np.bool_)
    if kept_before is not None:
        kept[:judged_from] = kept_before
    certain = np.where(np.arange(count) < judged_from, kept, similarity <= threshold)
    doubtful = np.flatnonzero(in_doubt(similarity, threshold, earlier >= judged_from, certain[earlier]))
    doubtful = doubtful[doubtful >= judged_from]
    # Of those identical to one dropped before, the first decides for all.
    same = np.flatnonzero(similarity[doubtful] == 1.0)
    firsts = np.unique(earlier[doubtful[same]], return_index=True)[1]
    doubtful = np.delete(doubtful, np.setdiff1d(same, same[firsts]))

    rows = _Rows(x, device) if len(doubtful) else None
    step = max(1, min(SCAN_SCORES // max(count, 1), TILE_ROWS))
    kept_row, found = np.full(count, -1, np.int64), np.full(count, NOTHING_EARLIER)
    place, heirs = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    start = judged_from
    for at in range(0, max(len(doubtful), 1), step):
        asked = doubtful[at : at + step]
        stop = count if at + step >= len(doubtful) else int(doubtful[at + step])
        place[asked] = np.arange(len(asked))
        offsets, others, scores = _candidates(rows, asked, threshold)
        grid = np.empty((0, 0), np.float32) if rows is None else rows.x
        norms = np.empty(0) if rows is None else rows.norms
        fine = _walk(
            *(start, stop, threshold, judged_from, similarity, earlier, grid, norms, place, offsets, others, scores),
            *(float32_error(x.shape[1] + 2), heirs, kept, kept_row, found),
        )
        if not fine:
            raise ArithmeticError(IMPRECISE)
        start = stop
    return kept_row, found


def _candidates(
    rows: _Rows | None, asked: npt.NDArray[np.int64], threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows that may be duplicates of those asked for, and a few others: offsets [n + 1], indices and scores."""
    if rows is None:
        return np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    last = int(asked[-1])
    scratch = torch.empty(len(asked) * last, device=rows.device)
    with full_precision():
        scores = rows.scores(torch.from_numpy(asked).to(rows.device), slice(0, last), scratch)
    pairs = (scores >= threshold - rows.error).nonzero(as_tuple=True)
    row, column = (index.cpu().numpy() for index in pairs)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(asked)))])
    return offsets, column, scores[pairs].cpu().numpy()


def duplicate_pairs(
    x: npt.NDArray[Any] | torch.Tensor,
    epsilon: float,
    *,
    rule: Literal["greedy", "any-earlier"] = "greedy",
    device: str = "auto",
    threads: int | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Which rows are duplicates of earlier ones.

    Args:
        x: [m, d], unit norm, in keep-order: an earlier row is kept rather than a later one. float32 is rounded to float16.
        epsilon: two rows are duplicates if their cosine is above 1 − ε.
        rule: "greedy": a row goes if it is a duplicate of one that stays; "any-earlier" (SemDeDup's): of any earlier one.
        device: of the matrix products; the result doesn't depend on it.
        threads: on the CPU; None for torch's number; the result doesn't depend on it.

    Returns:
        Rows that go, int64 [p] ascending; the most similar earlier row of each (under "greedy" that stays); their cosine, float64, 1 if
        they are identical.

    Raises:
        ValueError: ε isn't in [0, 2], or a row isn't of unit norm.
        ArithmeticError: matrix products are less precise than they should be.
    """
    if not 0 <= epsilon <= 2:
        raise ValueError(f"epsilon {epsilon}: must be in [0, 2]")
    rows = as_rows(x).astype(np.float16, copy=False)
    threshold = duplicate_threshold(epsilon)
    similarity, earlier = most_similar_earlier(rows, device=device, threads=threads)
    other = np.where(similarity > threshold, earlier, -1)
    if rule == "greedy":
        other, similarity = greedy(rows, similarity, earlier, threshold, device=device)
    gone = np.flatnonzero(other >= 0)
    return gone, other[gone], similarity[gone]


# --- pairs above a similarity, between two sets of rows -----------------------------------------------------------------


def similar_pairs(
    queries: npt.NDArray[np.float16],
    x: npt.NDArray[np.float16],
    threshold: float,
    *,
    device: str = "auto",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """All pairs of a query and a row whose similarity is above a threshold.

    Args:
        queries: [q, d], unit norm.
        x: [m, d], unit norm.
        threshold: of the similarity.
        device: of the matrix products; the result doesn't depend on it.

    Returns:
        Indices of queries and of rows, int64, ordered by both, and their similarities, float64; 1 if they are identical.

    Raises:
        ValueError: a row isn't of unit norm.
        ArithmeticError: matrix products are less precise than they should be.
    """
    left, right = _Rows(queries, device), _Rows(x, device)
    with full_precision():
        scores = torch.mm(left.unit, right.unit.T)
    pairs = (scores >= threshold - left.error).nonzero(as_tuple=True)
    query, row = (index.cpu().numpy() for index in pairs)
    exact = np.empty(len(query))
    for start in range(0, len(query), EXACT_PAIRS):
        some = slice(start, start + EXACT_PAIRS)
        a, b = left.x[query[some]], right.x[row[some]]
        dots = np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
        cosine = np.minimum(dots / (left.norms[query[some]] * right.norms[row[some]]), BELOW_ONE)
        exact[some] = np.where((a == b).all(axis=1), 1.0, cosine)
    if (np.abs(exact - scores[pairs].cpu().numpy()) > left.error).any():
        raise ArithmeticError(IMPRECISE)
    above = exact > threshold
    return query[above], row[above], exact[above]
