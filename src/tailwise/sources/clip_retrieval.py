"""Output of clip-retrieval inference: `{img,text}_emb/{img,text}_emb_{p}.npy` with `metadata/metadata_{p}.parquet`, joined by key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from tailwise.shards.columns import DAMAGE, count_rows, open_table, texts
from tailwise.sources.embedding_files import BadPartition, Naming, Opened, fingerprint, matrix_fault, matrix_size
from tailwise.sources.stored_rows import StoredRows

FOLDERS = {"image": "img_emb", "text": "text_emb"}


@dataclass(frozen=True)
class NamedArray:
    """A `.npy` file whose rows are named by a Parquet file.

    Attributes:
        array: the `.npy` file.
        metadata: the Parquet file with the column `image_path` (the tar key, or `{tar path}/{key}.jpg`), in the same row order.
    """

    array: Path
    metadata: Path
    naming: Naming = "key"
    home: None = None
    kind: ClassVar[str] = "embeddings"

    @property
    def path(self) -> Path:
        """The `.npy` file."""
        return self.array

    @property
    def fingerprint(self) -> str:
        """The fingerprint of both files."""
        return fingerprint(self.array, self.metadata)

    def names(self) -> Iterable[pa.Array]:
        """Return the column `image_path`."""
        return [read_names(self.metadata)]

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:  # noqa: ARG002  (read in place)
        """Check the array's header, and read the names."""
        try:
            array = StoredRows.of_file(self.array)
        except DAMAGE as error:
            return BadPartition(f"unreadable {self.kind}", str(error), count_rows(self.metadata))
        if fault := self.fault(array, dimension):
            return fault
        try:
            names = read_names(self.metadata)
        except DAMAGE as error:
            return BadPartition("unreadable metadata", str(error), len(array))
        if len(names) != len(array):
            return BadPartition("rows differ from metadata", f"{len(array)} rows, {len(names)} keys", len(array))
        return Opened(array, [names])

    def fault(self, array: StoredRows, dimension: int | None) -> BadPartition | None:
        """Return the reason why the array cannot be used, or None."""
        return matrix_fault(array.shape, array.dtype, dimension)

    def rows(self, unpacked: Path) -> StoredRows:  # noqa: ARG002
        """Return the array."""
        return StoredRows.of_file(self.array)


class Partition(NamedArray):
    """One file of embeddings, float16 or float32 [n, d], with its metadata; an EmbeddingFile."""

    def size(self) -> tuple[int, int] | None:
        """Return (n, d), or None."""
        try:
            array = StoredRows.of_file(self.array)
        except DAMAGE:
            return None
        return matrix_size(array.shape, array.dtype)


def find_partitions(folder: Path) -> dict[str, list[Partition]]:
    """Return the partitions of each column ("image", "text") in a folder, in numeric order; empty for another kind of folder."""
    files = {column: numbered_files(folder, name, ".npy") for column, name in FOLDERS.items()}
    return {column: [Partition(*pair) for pair in pairs] for column, pairs in files.items() if pairs}


def numbered_files(folder: Path, name: str, ending: str) -> list[tuple[Path, Path]]:
    """Return the files `{name}/{name}_{p}{ending}` of a folder, each with `metadata/metadata_{p}.parquet`, in numeric order of p."""
    numbered = [
        (int(match[1]), match[1], path)
        for path in (folder / name).glob("*.npy")
        if (match := re.fullmatch(rf"{name}_(\d+){re.escape(ending)}", path.name))
    ]
    return [(path, folder / "metadata" / f"metadata_{digits}.parquet") for _, digits, path in sorted(numbered)]


def read_names(metadata: Path) -> pa.Array:
    """Return the column `image_path` of a metadata file; raise DAMAGE if it cannot be read or has no such column of text."""
    with open_table(metadata, ["image_path"]) as file:
        return texts(file.read(["image_path"]).column(0), "image_path")
