"""Scores of image-text pairs from their embeddings.

n rows, d dimensions, B rows of a batch, T rows of a target set. Embeddings are float16 of unit norm: their dot products in float64 are
exact (see grid.py). What is not exact, exponentials and long sums, is computed by operations in a fixed order that don't depend on
threads: the same bits on any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit, jit_any_order, split_threads

if TYPE_CHECKING:
    import torch

TILE = 1024  # of the matrix of similarities; fixes the order of sums
_COLUMN_GRAIN = 64
COARSE = 2.0**12
GRAM_ROWS = 4096
# Of NormSim₂: rows of a tile; side of the least block; sums of a row, which fix the order.
_NORM_ROWS, _LEAF, _LANES = 512, 64, 8
MAX_TARGETS = 1 << 29

Half = npt.NDArray[np.float16]
Wide = npt.NDArray[np.float64]


# --- CLIP score -------------------------------------------------------------------------------------------------------


def cosines(image: Half, text: Half) -> Wide:
    """Cosine of each image with its text (CLIP score): float64 [n]; NaN where either row [d] is all zeros."""
    x, y = image.astype(np.float64), text.astype(np.float64)
    with np.errstate(invalid="ignore"):
        cosine: Wide = np.einsum("nd,nd->n", x, y) / (_norms(x) * _norms(y))
    return cosine


def _norms(x: Wide) -> Wide:
    norms: Wide = np.sqrt(np.einsum("nd,nd->n", x, x))
    return norms


# --- CLIPLoss ---------------------------------------------------------------------------------------------------------
# The exponential is our own: mathematical libraries differ in its last bit, and compilers turn this one into vector instructions.

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # its last 32 bits are zeros, so that small multiples are exact
_LN2_LOW = 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 · 2⁵²: adding it rounds to an integer, in the last bits
_ROUND_BITS = np.int64(np.float64(_ROUND).view(np.int64))
_BIAS = np.int64(1023)
_MANTISSA = np.int64(52)
_C = tuple(1.0 / float(np.prod(np.arange(1, power + 1, dtype=np.float64))) for power in range(14))  # 1/power!


@jit
def _exponentials(tile: Wide, left: Wide, right: Wide, sharpness: float, rows: Wide, start: int, stop: int) -> None:
    """Replaces similarities in rows [start, stop) of a tile by exp((cosine − 1) · sharpness), and adds up each row.

    Args:
        tile: [r, c], dot products.
        left: [r], what each row is scaled by to give cosines.
        right: [c], what each column is scaled by.
        sharpness: 1 / temperature.
        rows: [r], the sums; each by halving.
        start: first row.
        stop: last row + 1.
    """
    columns = tile.shape[1]
    half = (columns + 1) // 2
    sums = np.empty(half, np.float64)
    for row in range(start, stop):
        scale = left[row]
        line = tile[row]
        for column in range(columns):
            x = (line[column] * scale * right[column] - 1.0) * sharpness
            shifted = x * _LOG2_E + _ROUND
            power = shifted - _ROUND
            r = (x - power * _LN2_HIGH) - power * _LN2_LOW
            y = _C[12] + r * _C[13]
            y = _C[11] + r * y
            y = _C[10] + r * y
            y = _C[9] + r * y
            y = _C[8] + r * y
            y = _C[7] + r * y
            y = _C[6] + r * y
            y = _C[5] + r * y
            y = _C[4] + r * y
            y = _C[3] + r * y
            y = _C[2] + r * y
            y = _C[1] + r * y
            y = _C[0] + r * y
            bits = (np.float64(shifted).view(np.int64) - _ROUND_BITS + _BIAS) << _MANTISSA
            line[column] = y * np.int64(bits).view(np.float64)
        for column in range(columns - half):
            sums[column] = line[column] + line[column + half]
        if columns % 2:
            sums[half - 1] = line[half - 1]
        size = half
        while size > 1:
            half_size = (size + 1) // 2
            for column in range(size - half_size):
                sums[column] += sums[column + half_size]
            size = half_size
        rows[row] += sums[0]


@jit
def _add_columns(tile: Wide, columns: Wide, start: int, stop: int) -> None:
    """Adds up columns [start, stop) of a tile, by halving, into `columns`; spoils the tile."""
    size = tile.shape[0]
    while size > 1:
        half = (size + 1) // 2
        for row in range(size - half):
            for column in range(start, stop):
                tile[row, column] += tile[row + half, column]
        size = half
    for column in range(start, stop):
        columns[column] += tile[0, column]


def clip_loss(image: Half, text: Half, temperature: float, threads: int | None = None) -> Wide:
    """CLIPLoss of every pair of one batch (Wang et al. 2024, arXiv 2405.19547, section 3.1).

    s_ii − (τ/2) · (log Σ_m exp(s_im/τ) + log Σ_m exp(s_mi/τ)), where s_im is the cosine of image i and text m: the CLIP score, less
    what the pair would get anyway.

    Args:
        image: float16 [B, d], unit norm; no row of zeros.
        text: float16 [B, d], unit norm; no row of zeros.
        temperature: τ, at least 0.005, so that no exponential leaves float64.
        threads: of the sums; None for torch's number. The result doesn't depend on it.

    Returns:
        float64 [B]; at most 0. Takes B · 40 + 8 MB of memory.
    """
    import torch  # noqa: PLC0415  (seconds, which other scores do without)

    threads = threads or torch.get_num_threads()
    size = len(image)
    left = 1.0 / _row_norms(image)
    right = 1.0 / _row_norms(text)
    row_sums, column_sums = np.zeros(size), np.zeros(size)
    for top in range(0, size, TILE):
        x = torch.from_numpy(image[top : top + TILE].astype(np.float64))
        for first in range(0, size, TILE):
            y = torch.from_numpy(text[first : first + TILE].astype(np.float64))
            tile = torch.mm(x, y.T).numpy()
            over, across = slice(top, top + len(x)), slice(first, first + len(y))

            def rows(start: int, stop: int, tile: Wide = tile, over: slice = over, across: slice = across) -> None:
                _exponentials(tile, left[over], right[across], 1.0 / temperature, row_sums[over], start, stop)

            def columns(start: int, stop: int, tile: Wide = tile, across: slice = across) -> None:
                _add_columns(tile, column_sums[across], start, stop)

            split_threads(rows, tile.shape[0], threads)
            split_threads(columns, tile.shape[1], threads, _COLUMN_GRAIN)
    # The sums are of exp((s − 1)/τ): the two ones that were taken off come back as 1.
    anyway = 0.5 * temperature * (np.log(row_sums) + np.log(column_sums)) + 1.0
    return (
        np.concatenate(
            [cosines(image[start : start + TILE], text[start : start + TILE]) for start in range(0, size, TILE)]
        )
        - anyway
    )


def _row_norms(x: Half) -> Wide:
    return np.concatenate([_norms(x[start : start + TILE].astype(np.float64)) for start in range(0, len(x), TILE)])


# --- NormSim ----------------------------------------------------------------------------------------------------------


def gram(targets: Iterable[Half]) -> Wide:
    """Xᵀ X, float64 [d, d], of target rows X [T, d] that come in pieces.

    Each value is split into a multiple of 2⁻¹² and a rest: the products of the halves are sums of multiples of 2⁻²⁴, 2⁻³⁶ and 2⁻⁴⁸
    that float64 holds exactly up to 2²⁹ rows. So pieces, threads and order play no role.

    `targets`: one piece at least, float16, unit norm.
    """
    sums: list[Wide] = []
    for piece in targets:
        for start in range(0, len(piece), GRAM_ROWS):
            wide = piece[start : start + GRAM_ROWS].astype(np.float64)
            high = np.rint(wide * COARSE) / COARSE
            low = wide - high
            products = [high.T @ high, high.T @ low, low.T @ low]
            sums = [total + product for total, product in zip(sums, products, strict=True)] if sums else products
    high_high, high_low, low_low = sums
    whole: Wide = high_high + (high_low + high_low.T) + low_low
    return whole


def _on_two_grids(matrix: Wide) -> tuple[float, Wide, Wide]:
    """A symmetric positive matrix as scale · (coarse + fine): products of either with rows of unit norm are exact in any order.

    Scaled by a power of two, no column's norm is above 1. With coarse on multiples of 2⁻²⁸, products with multiples of 2⁻²⁴ are
    multiples of 2⁻⁵²; what is left is at most 2⁻²⁹, and the same holds for it on multiples of 2⁻⁵², for d ≤ 4096.
    """
    scale = 2.0 ** np.ceil(np.log2(np.trace(matrix)))
    scaled = matrix / scale
    coarse = np.rint(scaled * 2.0**28) / 2.0**28
    return float(scale), coarse, np.rint((scaled - coarse) * 2.0**52) / 2.0**52


class TargetGram:
    """Xᵀ X of target rows X [T, d], arranged for NormSim₂.

    xᵀ G x takes the products of one triangle: G is cut into halves again and again, and of the two blocks off the diagonal, one counts
    twice. Products are exact (`_on_two_grids`), so the bits depend on no library and no number of threads.
    """

    def __init__(self, matrix: Wide) -> None:
        """Takes `gram` of X, float64 [d, d]."""
        import torch  # noqa: PLC0415  (seconds, which other scores do without)

        self.scale, coarse, fine = _on_two_grids(matrix)
        self.blocks = [
            (rows, columns, torch.from_numpy(times * np.hstack([coarse[rows, columns], fine[rows, columns]]).T.copy()))
            for rows, columns, times in _triangle(0, len(matrix))
        ]

    def norms(self, image: Half) -> Wide:
        """Return NormSim₂: ‖X x_i‖₂, the root of the sum of squared cosines to all rows of X (Wang et al. 2024, section 3.2).

        `image`: float16 [n, d], unit norm. The norms are float64 [n], NaN for rows of zeros.
        """
        import torch  # noqa: PLC0415  (seconds, which other scores do without)

        from tailwise.kernels.threads import run_tiles  # noqa: PLC0415  (imports torch)

        norms = np.empty(len(image), np.float64)
        widest = max(len(block) for _, _, block in self.blocks)

        def work(start: int, memory: tuple[torch.Tensor, torch.Tensor]) -> None:
            half = image[start : start + _NORM_ROWS]
            x, products = memory[0][: len(half)], memory[1]
            wide, sums = x.numpy(), np.zeros((len(half), _LANES))
            wide[:] = half
            for rows, columns, block in self.blocks:
                product = products[: len(half) * len(block)].view(len(half), len(block))
                torch.mm(x[:, rows], block.T, out=product)
                _add_products(wide[:, columns], product.numpy(), sums)
            with np.errstate(invalid="ignore"):
                squares = np.maximum(reduce(np.add, sums.T), 0.0) * self.scale
                norms[start : start + len(half)] = np.sqrt(squares) / _norms(wide)

        def memory() -> tuple[torch.Tensor, torch.Tensor]:
            shape = (_NORM_ROWS, image.shape[1])
            return torch.empty(shape, dtype=torch.float64), torch.empty(_NORM_ROWS * widest, dtype=torch.float64)

        run_tiles(work, range(0, len(image), _NORM_ROWS), torch.get_num_threads(), memory)
        return norms


def _triangle(start: int, stop: int) -> Iterator[tuple[slice, slice, float]]:
    """Yield blocks of rows and columns that make up xᵀ G x, and how often each counts."""
    if stop - start <= _LEAF:
        yield slice(start, stop), slice(start, stop), 1.0
        return
    middle = (start + stop) // 2
    yield slice(start, middle), slice(middle, stop), 2.0
    yield from _triangle(start, middle)
    yield from _triangle(middle, stop)


@jit
def _add_products(x: Wide, products: Wide, sums: Wide) -> None:
    """Adds (products[:, :c] + products[:, c:]) · x [n, c], column j into sums [n, _LANES] at j mod _LANES."""
    columns = x.shape[1]
    whole = columns // _LANES * _LANES
    for row in range(len(x)):
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                column = start + lane
                sums[row, lane] += (products[row, column] + products[row, columns + column]) * x[row, column]
        for column in range(whole, columns):
            sums[row, column - whole] += (products[row, column] + products[row, columns + column]) * x[row, column]


def greatest_cosines(image: Half, targets: Iterable[Half]) -> Wide:
    """NormSim∞: ‖X x_i‖_∞, the greatest magnitude of a cosine to any row of a target set X (Wang et al. 2024, section 3.2).

    Args:
        image: float16 [n, d], unit norm.
        targets: pieces of X, float16 [t, d], unit norm.

    Returns:
        float64 [n], NaN for rows of zeros. Takes the memory of `image` and of one piece in float64, and 4,096 · t bytes a thread.
    """
    import torch  # noqa: PLC0415  (seconds, which other scores do without)

    from tailwise.kernels.threads import run_tiles  # noqa: PLC0415  (imports torch)

    x, greatest = image.astype(np.float64), np.zeros(len(image))
    for piece in targets:
        wide = piece.astype(np.float64)
        right, scales = torch.from_numpy(wide).T, 1.0 / _norms(wide)

        def work(start: int, product: torch.Tensor, right: torch.Tensor = right, scales: Wide = scales) -> None:
            rows = torch.from_numpy(x[start : start + _NORM_ROWS])
            torch.mm(rows, right, out=product[: len(rows)])
            _raise_to_greatest(product[: len(rows)].numpy(), scales, greatest[start : start + _NORM_ROWS])

        def memory(columns: int = len(piece)) -> torch.Tensor:
            return torch.empty((_NORM_ROWS, columns), dtype=torch.float64)

        run_tiles(work, range(0, len(x), _NORM_ROWS), torch.get_num_threads(), memory)
    with np.errstate(invalid="ignore"):
        cosine: Wide = greatest / _norms(x)
    return cosine


@jit_any_order
def _raise_to_greatest(products: Wide, scales: Wide, greatest: Wide) -> None:
    """Raises `greatest` [n] to the greatest |products| · scales of each row; the order plays no role in a maximum."""
    for row in range(len(products)):
        best = greatest[row]
        for column in range(products.shape[1]):
            best = max(best, abs(products[row, column]) * scales[column])
        greatest[row] = best
