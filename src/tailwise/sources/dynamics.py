"""The DynamiCS authors' files: clip-retrieval's layout, with the cluster of each row in `img_emb_{p}_indices.npy`.

Liang, Liu, de Vries, Larson: "Dynamic Cluster Data Sampling", ECCV 2026. Their `image_path` is `{tar path}/{key}.jpg`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import read_array
from tailwise.sources.clip_retrieval import FOLDERS, NamedArray, numbered_files, read_names_of
from tailwise.sources.columns import DAMAGE, count_rows
from tailwise.sources.embedding_files import BadPartition, Opened


class ClusterIds(NamedArray):
    """The cluster of each row of one partition, integers [n] or [n, 1]; read like a file of embeddings with one number a row."""

    def size(self) -> tuple[int, int] | None:
        """(n, 1), or None."""
        try:
            return len(read_array(self.array)), 1
        except DAMAGE:
            return None

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:  # noqa: ARG002
        """Maps it."""
        try:
            array = read_array(self.array)
        except DAMAGE as error:
            return BadPartition("unreadable cluster ids", str(error), count_rows(self.metadata))
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
    return [ClusterIds(*pair) for pair in numbered_files(folder, FOLDERS["image"], "_indices.npy")]
