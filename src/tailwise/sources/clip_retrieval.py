"""clip-retrieval inference output: `{img,text}_emb/{img,text}_emb_{p}.npy` with `metadata/metadata_{p}.parquet`, joined by key."""

from __future__ import annotations

import re
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog.files import read_array

FOLDERS = {"image": "img_emb", "text": "text_emb"}
# What NumPy raises on a bad file.
_DAMAGE = (OSError, ValueError, EOFError, TypeError, MemoryError, tokenize.TokenError)


@dataclass(frozen=True)
class Partition:
    """One file of embeddings with its metadata.

    Attributes:
        array: the `.npy` file, float16 or float32 [n, d].
        metadata: the Parquet file with the column `image_path` (the tar key), row for row.
    """

    array: Path
    metadata: Path


def find_partitions(folder: Path) -> dict[str, list[Partition]]:
    """The partitions of each column ("image", "text") that a folder holds, in numeric order; empty for another kind of folder."""
    columns: dict[str, list[Partition]] = {}
    for column, name in FOLDERS.items():
        numbered = [
            (int(match[1]), path)
            for path in (folder / name).glob("*.npy")
            if (match := re.fullmatch(rf"{name}_(\d+)\.npy", path.name))
        ]
        if numbered:
            columns[column] = [
                Partition(path, folder / "metadata" / path.name.replace(name, "metadata").replace(".npy", ".parquet"))
                for _, path in sorted(numbered)
            ]
    return columns


@dataclass(frozen=True)
class BadPartition:
    """Why a whole partition can't be used, and how many rows it would have had (0 where nobody knows)."""

    reason: str
    detail: str
    rows: int


def common_dimension(partitions: list[Partition]) -> int | None:
    """The width d that most rows have, so that one bad file doesn't decide; None if no file is readable."""
    rows: Counter[int] = Counter()
    for partition in partitions:
        try:
            array = read_array(partition.array)
        except _DAMAGE:
            continue
        if array.ndim == 2 and array.shape[1]:
            rows[array.shape[1]] += len(array)
    return rows.most_common(1)[0][0] if rows else None


def open_partition(partition: Partition, dimension: int | None) -> tuple[npt.NDArray[Any], pa.Array] | BadPartition:
    """Maps one partition and reads its keys.

    Args:
        partition: its two files.
        dimension: the width d that it must have; None takes any.

    Returns:
        Rows [n, d] (float16, float32 or float64) and keys [n], or why not.
    """
    try:
        array = read_array(partition.array)
    except _DAMAGE as error:
        return BadPartition("unreadable embeddings", str(error), 0)
    if array.ndim != 2 or not array.shape[1] or array.dtype not in (np.float16, np.float32, np.float64):
        return BadPartition("not an embedding matrix", f"{array.dtype} {list(array.shape)}", len(np.atleast_1d(array)))
    if dimension is not None and array.shape[1] != dimension:
        return BadPartition("wrong dimension", f"{array.shape[1]}, not {dimension}", len(array))
    try:
        keys = pq.read_table(partition.metadata, columns=["image_path"]).column(0).combine_chunks().cast(pa.string())
        keys.validate(full=True)  # Parquet doesn't promise UTF-8
    except (OSError, pa.ArrowException) as error:
        return BadPartition("unreadable metadata", str(error), len(array))
    if len(keys) != len(array):
        return BadPartition("rows differ from metadata", f"{len(array)} rows, {len(keys)} keys", len(array))
    return array, keys
