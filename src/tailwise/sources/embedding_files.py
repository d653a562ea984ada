"""Files of embeddings: rows that can be read in any order, and their names.

Shape letters: n rows of a file, d dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.shards.columns import DAMAGE, MAX_DIMENSION, count_rows
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
    """A file that can be used."""

    rows: npt.NDArray[Any] | StoredRows  # [n, d], not in memory
    names: Iterable[pa.Array]  # strings, n in all; can be read once
    unfit: npt.NDArray[np.bool_] | None = None  # [n], rows without a vector of d numbers; None if there is no such row


class EmbeddingFile(ABC):
    """One file of embeddings, with the file of its names."""

    path: Path  # the file with the numbers, for reports
    metadata: Path  # the file with the names; may be the same
    naming: Naming = "key"  # the kind of its names
    home: str | None = None  # the shard of a catalog that the rows belong to, if known
    kind: ClassVar[str] = "embeddings"  # name of the numbers, for reports

    @property
    def fingerprint(self) -> str:
        """Text that changes when the files change, to recognize a file that was joined before."""
        return fingerprint(self.path, self.metadata)

    @abstractmethod
    def header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of its rows; raise DAMAGE if they cannot be read."""

    @abstractmethod
    def names(self) -> Iterable[pa.Array]:
        """Return the names of its rows, strings; raise DAMAGE if they cannot be read."""

    @abstractmethod
    def rows(self, unpacked: Path) -> npt.NDArray[Any] | StoredRows:
        """Return the rows [n, d] of a file that was opened before."""

    def unpack(self, unpacked: Path, shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:  # noqa: ARG002  (most stay)
        """Write the rows to a file if they cannot be read in place; return `unfit` of Opened."""
        return None

    def fault(self, shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:
        """Return the reason why rows of this shape cannot be used, or None."""
        return matrix_fault(shape, dtype, dimension)

    def size(self) -> tuple[int, int] | None:
        """Return (n, d), or None if it cannot be read."""
        try:
            shape, dtype = self.header()
        except DAMAGE:
            return None
        return None if self.fault(shape, dtype, None) else (shape[0], shape[1])

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:
        """Check the file, and open it for one join.

        Args:
            dimension: the required width d; None accepts any.
            unpacked: file for a copy of the rows, if they cannot be read in place.
        """
        try:
            shape, dtype = self.header()
        except DAMAGE as error:
            return BadPartition(f"unreadable {self.kind}", str(error), count_rows(self.metadata))
        if fault := self.fault(shape, dtype, dimension):
            return fault
        try:
            names = self.names()
            named = sum(map(len, names))
        except DAMAGE as error:
            return BadPartition("unreadable metadata", str(error), shape[0])
        if named != shape[0]:
            detail = f"{shape[0]} rows, {named} {self.naming}s"
            return BadPartition("rows differ from metadata", detail, shape[0])
        try:
            unfit = self.unpack(unpacked, shape)
            return Opened(self.rows(unpacked), names if isinstance(names, list) else self.names(), unfit)
        except DAMAGE as error:
            return BadPartition(f"unreadable {self.kind}", str(error), shape[0])


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


def common_dimension(files: Sequence[EmbeddingFile]) -> int | None:
    """Return the width d of most rows, so that one bad file does not decide; None if no file is readable."""
    rows: Counter[int] = Counter()
    for file in files:
        if (size := file.size()) is not None:
            rows[size[1]] += size[0]
    return rows.most_common(1)[0][0] if rows else None
