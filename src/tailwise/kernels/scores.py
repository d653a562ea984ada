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

from tailwise.kernels.jit import jit

if TYPE_CHECKING:
    import torch

TILE = 1024  # columns of a tile of similarities, which fix the order of sums, as _BLOCK and _WAVE do
_BLOCK, _WAVE = 128, 8192  # rows that are multiplied at a time; that are coded at a time
BASE = 254.0  # of digits
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
def _digits(x: Wide, digits: npt.NDArray[np.int8], scale: Wide, ascending: bool) -> None:
    """Writes rows [n, d] as three digits to the base 254, each −127 … 127, and what to multiply products of the rows' numbers with.

    `digits` [n, 3 d] gets the first digits, the second, the third; the other way round if `ascending`. A number is (digits · 254 …) 2⁻ᵏ,
    with the greatest k that leaves room for all numbers of its row.
    """
    count, dimension = x.shape
    for row in range(count):
        greatest = 0.0
        for axis in range(dimension):
            greatest = max(greatest, abs(x[row, axis]))
        power = 127.0 * BASE * BASE / greatest
        scale[row] /= power
        for axis in range(dimension):
            rest = np.rint(x[row, axis] * power)
            for digit in range(3):
                higher = np.rint(rest / BASE) if digit < 2 else 0.0
                place = digit if ascending else 2 - digit
                digits[row, place * dimension + axis] = np.int8(rest - higher * BASE)
                rest = higher


@jit
def _exponentials(
    high: npt.NDArray[np.int32],
    middle: npt.NDArray[np.int32],
    low: npt.NDArray[np.int32],
    left: Wide,
    right: Wide,
    sharpness: float,
    rows: Wide,
    columns: Wide,
) -> None:
    """Adds exp((cosine − 1) · sharpness) of a tile to the sums of its rows and columns.

    Args:
        high: int32 [≥ r, ≥ c], products of the first digits.
        middle: of first and second digits.
        low: of first and third, and of second digits.
        left: [r], what each row's products are scaled by to give cosines.
        right: [c], what each column's are scaled by.
        sharpness: 1 / temperature.
        rows: [r], the sums; each by halving.
        columns: [c], the sums; row by row.
    """
    count = len(right)
    half = (count + 1) // 2
    line = np.empty(count, np.float64)
    for row in range(len(left)):
        scale = left[row]
        for column in range(count):
            product = (np.float64(high[row, column]) * BASE + np.float64(middle[row, column])) * BASE
            x = ((product + np.float64(low[row, column])) * scale * right[column] - 1.0) * sharpness
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
        for column in range(count):
            columns[column] += line[column]
        size = count
        while size > 1:
            half = (size + 1) // 2
            for column in range(size - half):
                line[column] += line[column + half]
            size = half
        rows[row] += line[0]


class _Digits:
    """Rows as they are multiplied: digits int8 [n, 3 d], rows of zeros up to a multiple of PAD; and the scale [n] of their products."""

    def __init__(self, x: Half, *, ascending: bool) -> None:
        import torch  # noqa: PLC0415  (seconds, which other scores do without)

        from tailwise.kernels.screening import PAD  # noqa: PLC0415  (imports torch)

        wide = x.astype(np.float64)
        digits = np.zeros((-(-len(x) // PAD) * PAD, 3 * x.shape[1]), np.int8)
        self.scale = BASE / _norms(wide)
        _digits(wide, digits, self.scale, ascending)
        self.digits = torch.from_numpy(digits)


def clip_loss(image: Half, text: Half, temperature: float, threads: int | None = None) -> Wide:
    """CLIPLoss of every pair of one batch (Wang et al. 2024, arXiv 2405.19547, section 3.1).

    s_ii − (τ/2) · (log Σ_m exp(s_im/τ) + log Σ_m exp(s_mi/τ)), where s_im is the cosine of image i and text m: the CLIP score, less
    what the pair would get anyway. The cosines of the sums are right to about 10⁻⁷: of the nine products of three digits by three, the
    least three are left out.

    Args:
        image: float16 [B, d], unit norm; no row of zeros.
        text: float16 [B, d], unit norm; no row of zeros.
        temperature: τ, at least 0.005, so that no exponential leaves float64.
        threads: None for torch's number. The result doesn't depend on it.

    Returns:
        float64 [B]; at most 0. Takes B · 40 bytes, 100,000 · d bytes and 20 MB of memory.
    """
    import torch  # noqa: PLC0415  (seconds, which other scores do without)

    threads = threads or torch.get_num_threads()
    size = len(image)
    row_sums, column_sums = np.zeros(size), np.zeros(size)
    for top in range(0, size, _WAVE):
        left = _Digits(image[top : top + _WAVE], ascending=False)
        for first in range(0, size, TILE):
            right = _Digits(text[first : first + TILE], ascending=True)
            sums = _add_exponentials(left, right, 1.0 / temperature, row_sums[top : top + _WAVE], threads)
            column_sums[first : first + TILE] += sums
    # The sums are of exp((s − 1)/τ): the two ones that were taken off come back as 1.
    anyway = 0.5 * temperature * (np.log(row_sums) + np.log(column_sums)) + 1.0
    return (
        np.concatenate(
            [cosines(image[start : start + TILE], text[start : start + TILE]) for start in range(0, size, TILE)]
        )
        - anyway
    )


def _add_exponentials(left: _Digits, right: _Digits, sharpness: float, row_sums: Wide, threads: int) -> Wide:
    """Adds exp((cosine − 1) · sharpness) of rows with columns to the sums of the rows; return those of the columns."""
    import torch  # noqa: PLC0415  (seconds, which other scores do without)

    from tailwise.kernels.products import multiply  # noqa: PLC0415  (imports torch)
    from tailwise.kernels.threads import run_tiles  # noqa: PLC0415  (imports torch)

    starts = range(0, len(row_sums), _BLOCK)
    dimension, sums = right.digits.shape[1] // 3, np.zeros((len(starts), len(right.scale)))

    def work(start: int, memory: list[torch.Tensor]) -> None:
        rows = slice(start, start + _BLOCK)
        high, middle, low = (
            multiply(left.digits[rows, : part * dimension], right.digits[:, (3 - part) * dimension :], scratch).numpy()
            for part, scratch in zip((1, 2, 3), memory, strict=True)
        )
        scales, own = (left.scale[rows], right.scale), sums[start // _BLOCK]
        _exponentials(high, middle, low, *scales, sharpness, row_sums[rows], own)

    def memory() -> list[torch.Tensor]:
        return [torch.empty(_BLOCK * TILE, dtype=torch.int32) for _ in range(3)]

    run_tiles(work, starts, threads, memory)
    return reduce(np.add, sums)


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


def _on_grid(block: Wide) -> Wide:
    """Round each column to multiples of 2⁻²⁸ of a power of two above its norm.

    A product with a row of unit norm, a multiple of 2⁻²⁴, is then a multiple of 2⁻⁵² and at most 1 in that unit: exact in any order.
    """
    unit = 2.0 ** (np.ceil(np.log2(np.maximum(np.linalg.norm(block, axis=0), 2.0**-200))) - 28)
    return np.asarray(np.rint(block / unit) * unit)


class TargetGram:
    """Xᵀ X of target rows X [T, d], arranged for NormSim₂.

    xᵀ G x takes the products of one triangle: G is cut into halves again and again, and of the two blocks off the diagonal, one counts
    twice. G is rounded so that products are exact (`_on_grid`): the bits depend on no library and no number of threads.
    """

    def __init__(self, matrix: Wide) -> None:
        """Takes `gram` of X, float64 [d, d]."""
        import torch  # noqa: PLC0415  (seconds, which other scores do without)

        self.blocks = [
            (rows, columns, torch.from_numpy((times * _on_grid(matrix[rows, columns])).T.copy()))
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
                squares = np.maximum(reduce(np.add, sums.T), 0.0)
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
    """Adds products · x [n, c], column j into sums [n, _LANES] at j mod _LANES."""
    columns = x.shape[1]
    whole = columns // _LANES * _LANES
    for row in range(len(x)):
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                sums[row, lane] += products[row, start + lane] * x[row, start + lane]
        for column in range(whole, columns):
            sums[row, column - whole] += products[row, column] * x[row, column]
