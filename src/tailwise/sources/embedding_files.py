"""The interface of files of embeddings: rows that can be read in any order, and their names.

Shape letters: n rows of a file, d dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.shards.columns import MAX_DIMENSION
from tailwise.sources.stored_rows import StoredRows

FLOATS = (np.float16, np.float32, np.float64)
Naming = Literal["key", "uid"]  # "key": a key, or a path that ends in tar and key


@dataclass(frozen=True)
class BadPartition:
    """The reason why a whole file cannot be used, and its number of rows (0 if unknown)."""

    reason: str
    detail: str
    rows: int


@dataclass(frozen=True)
class Opened:
    """A file that can be used.

    Attributes:
        rows: [n, d], not in memory.
        names: string arrays, n in all; can be read once.
        unfit: bool [n], rows without a vector of d numbers; None if there is no such row.
    """

    rows: npt.NDArray[Any] | StoredRows
    names: Iterable[pa.Array]
    unfit: npt.NDArray[np.bool_] | None = None


class EmbeddingFile(Protocol):
    """One file of embeddings, with the file of its names."""

    @property
    def path(self) -> Path:
        """The file with the numbers, for reports."""

    @property
    def fingerprint(self) -> str:
        """Text that changes when the file changes, to recognize a file that was joined before."""

    @property
    def naming(self) -> Naming:
        """The kind of its names."""

    @property
    def home(self) -> str | None:
        """The shard of a catalog that the rows belong to, if known."""

    def size(self) -> tuple[int, int] | None:
        """Return (n, d), or None if it cannot be read."""

    def names(self) -> Iterable[pa.Array]:
        """Return the names of its rows; an OSError, ValueError or ArrowException means that they cannot be read."""

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Open the file for one join.

        Args:
            dimension: the required width d; None accepts any.
            unpacked: file for a copy of the rows, if they cannot be read in place.
        """

    def rows(self, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
        """Return the rows [n, d] of a file that was opened before."""


def fingerprint(*paths: Path) -> str:
    """Return path, size and time of files."""
    found = [(path, path.stat() if path.exists() else None) for path in paths]
    return " ".join(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" if stat else f"{path}:absent" for path, stat in found)


def matrix_fault(shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:
    """Return the reason why an array is not rows of d numbers, or None."""
    rows = shape[0] if shape else 1
    if len(shape) != 2 or not shape[1] or dtype.newbyteorder("=") not in FLOATS:
        return BadPartition("not an embedding matrix", f"{dtype} {list(shape)}", rows)
    if shape[1] > MAX_DIMENSION:
        many = f"{list(shape)}: more than {MAX_DIMENSION:,} numbers a row"
        return BadPartition("not an embedding matrix", many, rows)
    if dimension is not None and shape[1] != dimension:
        return BadPartition("wrong dimension", f"{shape[1]}, not {dimension}", rows)
    return None


def matrix_size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Return (n, d) of an array of embeddings; None for another array."""
    return None if matrix_fault(shape, dtype, None) else (shape[0], shape[1])


def common_dimension(files: Sequence[EmbeddingFile]) -> int | None:
    """Return the width d of most rows, so that one bad file does not decide; None if no file is readable."""
    rows: Counter[int] = Counter()
    for file in files:
        if (size := file.size()) is not None:
            rows[size[1]] += size[0]
    return rows.most_common(1)[0][0] if rows else None
