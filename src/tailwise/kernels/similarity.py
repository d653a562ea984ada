"""Cosines of rows with one another, exactly: with all earlier rows, with other rows.

The similarity of two rows is the cosine of their float16 embeddings: the exact dot product over the product of the exact norms,
in float64 (see grid.py). Approximate products of normalised rows screen within their error bound (see screening.py); the exact similarity
decides, so that results don't depend on threads, tiles or devices.

Similarity 1 means identical, and nothing else does: rows that differ have at most BELOW_ONE. Identical rows have the same
similarity to every other row, so that only the first of them need be compared; a clique of n identical rows costs n, not n².

m: rows, in keep-order; d: dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.kernels.assign import NONE, resolve_device
from tailwise.kernels.grid import row_norms, to_grid
from tailwise.kernels.jit import jit
from tailwise.kernels.nearest import decide_earlier, decide_pairs
from tailwise.kernels.products import WrongProductError, float32_error, multiply, repeat_if_wrong
from tailwise.kernels.screening import Coded, Columns, Screen, full_precision, scratch_for
from tailwise.kernels.threads import run_tiles

_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x00000100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_MINUS_ZERO = np.uint16(0x8000)  # the bits of −0, which equals 0
BELOW_ONE = float(np.nextafter(1.0, 0.0))
NOTHING_EARLIER = -np.inf  # the similarity of a row without an earlier one
TILE_ROWS = 512  # of scores
TILE_COLUMNS = 1024
CENTRE_ROWS = 256  # whose mean serves as the centre of all
SMALL = 4096  # members of a cluster that one thread does best, and rows that are coded at a time
DEVICE_ROWS = 512
DEVICE_COLUMNS = 4096
EXACT_PAIRS = 1 << 13  # similarities at a time, of pairs between two sets of rows


@jit
def _hash_words(words: npt.NDArray[np.unsignedinteger[Any]], hashes: npt.NDArray[np.uint64]) -> None:
    """FNV-1a over words of whatever width, four at a time, mixed so that the low bits depend on all."""
    whole = words.shape[1] - words.shape[1] % 4
    for row in range(words.shape[0]):
        a = b = c = d = _OFFSET  # four chains, for each product waits for the one before it
        for axis in range(0, whole, 4):
            a = (a ^ (a >> _HALF) ^ np.uint64(words[row, axis])) * _PRIME
            b = (b ^ (b >> _HALF) ^ np.uint64(words[row, axis + 1])) * _PRIME
            c = (c ^ (c >> _HALF) ^ np.uint64(words[row, axis + 2])) * _PRIME
            d = (d ^ (d >> _HALF) ^ np.uint64(words[row, axis + 3])) * _PRIME
        for axis in range(whole, words.shape[1]):
            a = (a ^ (a >> _HALF) ^ np.uint64(words[row, axis])) * _PRIME
        value = _OFFSET
        for chain in (a, b, c, d):
            value = (value ^ chain ^ (chain >> _HALF)) * _GOLDEN
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


class Rows:
    """Rows where the matrix products run, and on the grid where exact similarities are taken."""

    def __init__(self, x: npt.NDArray[np.float16], device: str) -> None:
        self.x = torch.from_numpy(np.ascontiguousarray(x)).float().numpy()  # float16 is on the grid
        self.norms = row_norms(self.x)
        _refuse_zeros(self.norms)
        self.error = float32_error(x.shape[1] + 2)  # unit rows are rounded twice
        self.device = torch.device(resolve_device(device))
        unit = self.x / self.norms.astype(np.float32)[:, None]
        self.unit = torch.from_numpy(unit).to(self.device)

    def scores(self, rows: slice | torch.Tensor, columns: slice, scratch: torch.Tensor) -> torch.Tensor:
        """Approximate similarities [rows, columns], in the memory of `scratch`."""
        return multiply(self.unit[rows], self.unit[columns], scratch)


def _refuse_zeros(norms: npt.NDArray[np.float64]) -> None:
    if not norms.all():
        raise ValueError(f"row {int(np.flatnonzero(norms == 0)[0])} is zero: it has no similarity to any other")


@repeat_if_wrong
def most_similar_earlier(
    x: npt.NDArray[np.float16], *, judged_from: int = 0, device: str = "auto", threads: int | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The most similar earlier row of each row, and the similarity to it; ties go to the earliest, of identical ones to the first judged.

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
        best, at = _most_similar_on_device(Rows(unlike, device), start)
    similarity, earlier = np.full(len(x), NOTHING_EARLIER), np.full(len(x), -1, np.int64)
    found = np.flatnonzero(at >= 0)
    similarity[distinct[found]], earlier[distinct[found]] = best[found], distinct[at[found]]
    if judged_from:  # a judged row that is identical comes before those that are not judged
        again = first_of_identical(x[judged_from:]) + judged_from
        first[judged_from:] = np.where(again < np.arange(judged_from, len(x)), again, first[judged_from:])
    copies = np.flatnonzero(first < np.arange(len(x)))
    copies = copies[copies >= judged_from]
    similarity[copies], earlier[copies] = 1.0, first[copies]
    return similarity, earlier


def _most_similar_on_cpu(
    x: npt.NDArray[np.float16], start: int, threads: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    count = len(x)
    rows, norms = np.empty(x.shape, np.float32), np.empty(count)
    best, earlier = np.full(count, NONE), np.full(count, -1, np.int64)
    small = count <= SMALL
    height = TILE_ROWS // 2 if small else TILE_ROWS  # half a tile of rows is compared with later rows in vain
    screen = Screen(to_grid(to_grid(x[:CENTRE_ROWS]).mean(axis=0, dtype=np.float64)))
    codes = Coded.memory_for(count, x.shape[1], screen.precision)

    def code(first: int, _: None) -> None:
        tile = slice(first, min(first + SMALL, count))
        to_grid(x[tile], rows[tile])
        norms[tile] = row_norms(rows[tile], first=first)
        screen.rows(rows[tile], (1 / np.maximum(norms[tile], 0.5)).astype(np.float32), codes[tile])

    def compare(first_row: int, scratch: torch.Tensor) -> None:
        stop = min(first_row + height, count)
        for first_column in range(0, stop, TILE_COLUMNS):
            some = Columns.of(columns[first_column : min(first_column + TILE_COLUMNS, stop)])
            scores = screen.scores(codes[first_row:stop], some, scratch)
            if not decide_earlier(*scores, rows, norms, first_row, first_column, BELOW_ONE, best, earlier):
                raise WrongProductError

    run_tiles(code, range(0, count, SMALL), threads, lambda: None)
    _refuse_zeros(norms)
    columns = screen.as_columns(codes)
    with full_precision():
        tiles = range(start, count, height)
        size = min(height, count), min(TILE_COLUMNS, count)
        run_tiles(compare, tiles[::-1], threads, lambda: scratch_for(screen.precision, *size))
    return best, earlier


def _most_similar_on_device(rows: Rows, start: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    count = len(rows.x)
    best, earlier = np.full(count, NONE), np.full(count, -1, np.int64)
    scratch = torch.empty(min(DEVICE_ROWS, count) * min(DEVICE_COLUMNS, count), device=rows.device)
    with full_precision():
        for first_row in range(start, count, DEVICE_ROWS):
            last_row = min(first_row + DEVICE_ROWS, count)
            for first_column in range(0, last_row, DEVICE_COLUMNS):
                columns = slice(first_column, min(first_column + DEVICE_COLUMNS, last_row))
                scores = rows.scores(slice(first_row, last_row), columns, scratch)
                _decide_on_device(rows, scores, first_row, first_column, best, earlier)
    return best, earlier


def _decide_on_device(
    rows: Rows,
    scores: torch.Tensor,
    first_row: int,
    first_column: int,
    best: npt.NDArray[np.float64],
    earlier: npt.NDArray[np.int64],
) -> None:
    """The device finds the candidates, and the CPU decides them."""
    at = torch.arange(len(scores), device=scores.device)[:, None] + (first_row - first_column)
    scores.masked_fill_(torch.arange(scores.shape[1], device=scores.device)[None] >= at, NONE)
    known = torch.from_numpy(best[first_row : first_row + len(scores)]).to(scores.device)
    floor = torch.maximum(scores.amax(1).double() - 2 * rows.error, known - rows.error).clamp_(min=-2.0)
    pairs = (scores >= floor[:, None]).nonzero(as_tuple=True)
    values = scores[pairs].cpu().numpy()
    row, column = (index.cpu().numpy() for index in pairs)
    pair = first_row + row, first_column + column, values
    if not decide_pairs(*pair, rows.x, rows.norms, rows.error, BELOW_ONE, best, earlier):
        raise WrongProductError


@repeat_if_wrong
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
    """
    left, right = Rows(queries, device), Rows(x, device)
    with full_precision():
        scores = multiply(left.unit, right.unit, left.unit.new_empty(len(queries) * len(x)))
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
        raise WrongProductError
    above = exact > threshold
    return query[above], row[above], exact[above]
