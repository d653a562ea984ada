"""Output of clip-retrieval inference: `{img,text}_emb/{img,text}_emb_{p}.npy` with `metadata/metadata_{p}.parquet`, joined by key.

The DynamiCS authors add the cluster of each row in `img_emb_{p}_indices.npy`; their `image_path` is `{tar path}/{key}.jpg`.
Liang, Liu, de Vries, Larson: "Dynamic Cluster Data Sampling", ECCV 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailwise.shards.columns import open_table, texts
from tailwise.sources.embedding_files import BadPartition, EmbeddingFile, StoredRows

FOLDERS = {"image": "img_emb", "text": "text_emb"}


@dataclass(frozen=True)
class Partition(EmbeddingFile):
    """A `.npy` file, float16 or float32 [n, d], whose rows are named by a Parquet file."""

    path: Path
    metadata: Path  # has the column `image_path` (the tar key, or `{tar path}/{key}.jpg`), in the same row order

    def header(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of the array."""
        array = StoredRows.of_file(self.path)
        return array.shape, array.dtype

    def names(self) -> list[pa.Array]:
        """Return the column `image_path`; raise DAMAGE if it cannot be read, or is missing, or no text."""
        with open_table(self.metadata, ["image_path"]) as file:
            return [texts(file.read(["image_path"]).column(0), "image_path")]

    def rows(self, unpacked: Path) -> StoredRows:  # noqa: ARG002
        """Return the array."""
        return StoredRows.of_file(self.path)


class ClusterIds(Partition):
    """The cluster of each row of one partition, integers [n] or [n, 1]; read like embeddings with one number a row."""

    kind = "cluster ids"

    def fault(self, shape: tuple[int, ...], dtype: np.dtype[Any], dimension: int | None) -> BadPartition | None:  # noqa: ARG002
        """Return the reason why the array cannot be used, or None."""
        if dtype.kind in "iu" and shape[1:] in ((), (1,)) and shape:
            return None
        return BadPartition("not a column of cluster ids", f"{dtype} {list(shape)}", shape[0] if shape else 1)


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


def find_cluster_ids(folder: Path) -> list[ClusterIds]:
    """Return the files of cluster ids in a folder of this layout, in numeric order."""
    return [ClusterIds(*pair) for pair in numbered_files(folder, FOLDERS["image"], "_indices.npy")]
