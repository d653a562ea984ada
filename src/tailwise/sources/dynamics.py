"""The DynamiCS authors' files: clip-retrieval's layout, with the cluster of each row in `img_emb_{p}_indices.npy`.

Liang, Liu, de Vries, Larson: "Dynamic Cluster Data Sampling", ECCV 2026. Their `image_path` is `{tar path}/{key}.jpg`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.files import read_array
from tailwise.sources.clip_retrieval import FOLDERS, read_names, read_names_of
from tailwise.sources.embedding_files import DAMAGE, BadPartition, Naming, Opened, fingerprint


@dataclass(frozen=True)
class ClusterIds:
    """The cluster of each row of one partition; read like a file of embeddings with one number a row.

    Attributes:
        array: the `.npy` file, integers [n] or [n, 1].
        metadata: the partition's Parquet file, row for row.
    """

    array: Path
    metadata: Path
    naming: Naming = "key"
    home: None = None

    @property
    def path(self) -> Path:
        """The `.npy` file."""
        return self.array

    @property
    def fingerprint(self) -> str:
        """Of both files."""
        return fingerprint(self.array, self.metadata)

    def size(self) -> tuple[int, int] | None:
        """(n, 1), or None."""
        try:
            return len(read_array(self.array)), 1
        except DAMAGE:
            return None

    def names(self) -> Iterable[pa.Array]:
        """The column `image_path`."""
        return [read_names(self.metadata)]

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:  # noqa: ARG002
        """Maps it."""
        try:
            array = read_array(self.array)
        except DAMAGE as error:
            return BadPartition("unreadable cluster ids", str(error), 0)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
            rows = len(np.atleast_1d(array))
            return BadPartition("not a column of cluster ids", f"{array.dtype} {list(array.shape)}", rows)
        names = read_names_of(self.metadata, len(array))
        return names if isinstance(names, BadPartition) else Opened(array.reshape(-1, 1), [names])

    def rows(self, unpacked: Path) -> npt.NDArray[Any]:  # noqa: ARG002
        """The ids [n, 1], mapped."""
        return read_array(self.array).reshape(-1, 1)


def find_cluster_ids(folder: Path) -> list[ClusterIds]:
    """The files of cluster ids in a folder of clip-retrieval's layout, in numeric order."""
    name = FOLDERS["image"]
    numbered = [
        (int(match[1]), path)
        for path in (folder / name).glob("*.npy")
        if (match := re.fullmatch(rf"{name}_(\d+)_indices\.npy", path.name))
    ]
    return [
        ClusterIds(
            path,
            folder / "metadata" / path.name.replace(name, "metadata").replace("_indices.npy", ".parquet"),
        )
        for _, path in sorted(numbered)
    ]
