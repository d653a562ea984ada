"""The grid that makes sums exact.

Every float16 of magnitude ≤ 1 is a multiple of 2⁻²⁴; centroids are rounded to that grid too. A product of two is then a multiple
of 2⁻⁴⁸, and by Cauchy-Schwarz no partial sum of a dot product of two unit vectors exceeds 1, so that float64 (53 bits) holds every
partial sum exactly: dot products are the same in whatever order, with whatever library, on whatever number of threads. Sums of rows
are whole numbers of 2⁻²⁴, held in 64 bits. Labels, centroids and similarities inherit it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit, jit_any_order
from tailwise.mapped import release_pages

if TYPE_CHECKING:
    import torch

GRID = 2.0**-24
SIMILARITY_UNIT = 2.0**-30  # sums of similarities are held as integers of this unit, exact in any order


def to_grid(x: npt.NDArray[Any], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """Round to multiples of 2⁻²⁴; float32, exact for |x| ≤ 1, in `out` (contiguous) if given. float16 is on the grid already."""
    rounded = np.empty(x.shape, np.float32) if out is None else out
    if x.dtype == np.float16:  # NumPy takes several times as long as torch, which wants it writable
        import torch  # noqa: PLC0415  (seconds, which plans and exports do without)

        torch.from_numpy(rounded).copy_(torch.from_numpy(np.array(x, order="C")))
    elif x.dtype == np.float32:
        _round_to_grid(np.ascontiguousarray(x).ravel(), rounded.ravel())
    else:
        np.copyto(rounded, np.rint(x.astype(np.float64) / GRID) * GRID, casting="same_kind")
    return rounded


@jit
def _round_to_grid(x: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    for at in range(len(x)):
        out[at] = np.float32(np.rint(np.float64(x[at]) * (1 / GRID)) * GRID)


def to_similarity_units(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Similarities as integers of 2⁻³⁰, so that their sums are exact in any order."""
    return np.rint(similarity / SIMILARITY_UNIT).astype(np.int64)


def unit_rows_on_grid(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Scales rows [n, d], of float64 or sums in int64, to unit norm and rounds them to the grid; rows of zeros stay."""
    rounded = np.empty(x.shape, np.float32)
    _unit_rows(np.ascontiguousarray(x, dtype=None if x.dtype == np.int64 else np.float64), rounded)
    return rounded


@jit  # sums in the order of the coordinates: the same on every processor
def _unit_rows(x: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
    for row in range(x.shape[0]):
        total = 0.0
        for axis in range(x.shape[1]):
            total += np.float64(x[row, axis]) * np.float64(x[row, axis])
        norm = np.sqrt(total) if total > 0 else 1.0
        for axis in range(x.shape[1]):
            out[row, axis] = np.float32(np.rint(np.float64(x[row, axis]) / norm * (1 / GRID)) * GRID)


@jit_any_order  # squares of grid values are multiples of 2⁻⁴⁸ and sum up to about 1: exact in any order
def _squared_norms(x: npt.NDArray[np.float32], out: npt.NDArray[np.float64]) -> None:
    for row in range(x.shape[0]):
        total = 0.0
        for column in range(x.shape[1]):
            value = np.float64(x[row, column])
            total += value * value
        out[row] = total


def row_norms(x: npt.NDArray[np.float32], *, first: int = 0) -> npt.NDArray[np.float64]:
    """Euclidean norms [n] of grid rows [n, d]; `first` is the number of the first, for messages.

    Raises:
        ValueError: a row is neither zero nor of unit norm (to 5 %).
    """
    squares = np.empty(len(x), np.float64)
    _squared_norms(x, squares)
    wrong = np.flatnonzero((squares != 0) & ~(np.abs(squares - 1) < 0.1))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(f"row {first + at} has norm {np.sqrt(squares[at]):.4g}, not 1: normalise the rows first")
    return np.sqrt(squares)


def as_rows(x: npt.NDArray[Any] | torch.Tensor) -> npt.NDArray[Any]:
    """The same rows as a NumPy array; bfloat16, which NumPy hasn't, as float32."""
    if hasattr(x, "detach"):  # a tensor, of a torch that need not be imported for arrays
        x = x.detach().cpu()
        return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
    return x if isinstance(x, np.ndarray) else np.asarray(x)  # mapped rows stay mapped: their pages are given back


def row_chunks(blocks: Sequence[npt.NDArray[Any]], rows: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Cuts blocks [n_b, d] into chunks of at most `rows` rows, with the index of each chunk's first row.

    Pages of memory-mapped blocks are given back as soon as the consumer asks for the next chunk.
    """
    first = 0
    for block in blocks:
        for start in range(0, len(block), rows):
            yield first + start, block[start : start + rows]
            release_pages(block)
        first += len(block)
