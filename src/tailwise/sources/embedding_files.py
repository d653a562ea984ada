"""What every format of embeddings offers to the joins: rows that can be read in any order, and what names each of them.

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
    """Why a whole file can't be used, and how many rows it would have had (0 where nobody knows)."""

    reason: str
    detail: str
    rows: int


@dataclass(frozen=True)
class Opened:
    """A file that can be used.

    Attributes:
        rows: [n, d], not in memory.
        names: string arrays, n in all; taken once.
        unfit: bool [n], rows that have no vector of d numbers; None where all have.
    """

    rows: npt.NDArray[Any] | StoredRows
    names: Iterable[pa.Array]
    unfit: npt.NDArray[np.bool_] | None = None


class EmbeddingFile(Protocol):
    """One file of embeddings, with whatever else it takes to know whose they are."""

    @property
    def path(self) -> Path:
        """The file with the numbers, for reports."""

    @property
    def fingerprint(self) -> str:
        """What tells whether it was joined before."""

    @property
    def naming(self) -> Naming:
        """What its rows are named by."""

    @property
    def home(self) -> str | None:
        """The shard of a catalog that its rows are, where that is known beforehand."""

    def size(self) -> tuple[int, int] | None:
        """(n, d), or None if it can't be read."""

    def names(self) -> Iterable[pa.Array]:
        """What names its rows; an OSError, ValueError or ArrowException if that can't be read."""

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Opens it for one join.

        Args:
            dimension: the width d that it must have; None takes any.
            unpacked: a file to lay the rows out in, if they can't be read where they lie.
        """

    def rows(self, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
        """The rows [n, d] of an opened file, opened anew."""


def fingerprint(*paths: Path) -> str:
    """Path, size and time of files."""
    return " ".join(
        f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" if path.exists() else f"{path}:absent"
        for path in paths
    )


def matrix_fault(shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:
    """Why an array can't be rows of d numbers, or None."""
    rows = shape[0] if shape else 1
    if len(shape) != 2 or not shape[1] or dtype.newbyteorder("=") not in FLOATS:
        return BadPartition("not an embedding matrix", f"{dtype} {list(shape)}", rows)
    if shape[1] > MAX_DIMENSION:
        return BadPartition(
            "not an embedding matrix", f"{list(shape)}: more than {MAX_DIMENSION:,} numbers a row", rows
        )
    if dimension is not None and shape[1] != dimension:
        return BadPartition("wrong dimension", f"{shape[1]}, not {dimension}", rows)
    return None


def matrix_size(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Return (n, d) of an array of embeddings; None for another array."""
    return None if matrix_fault(shape, dtype, None) else (shape[0], shape[1])


def common_dimension(files: Sequence[EmbeddingFile]) -> int | None:
    """The width d that most rows have, so that one bad file doesn't decide; None if no file is readable."""
    rows: Counter[int] = Counter()
    for file in files:
        if (size := file.size()) is not None:
            rows[size[1]] += size[0]
    return rows.most_common(1)[0][0] if rows else None
