"""Files of the DynamiCS authors: clip-retrieval's layout, with the cluster of each row in `img_emb_{p}_indices.npy`.

Liang, Liu, de Vries, Larson: "Dynamic Cluster Data Sampling", ECCV 2026. Their `image_path` is `{tar path}/{key}.jpg`.
"""

from __future__ import annotations

from pathlib import Path

from tailwise.shards.columns import DAMAGE
from tailwise.sources.clip_retrieval import FOLDERS, NamedArray, numbered_files
from tailwise.sources.embedding_files import BadPartition
from tailwise.sources.stored_rows import StoredRows


class ClusterIds(NamedArray):
    """The cluster of each row of one partition, integers [n] or [n, 1]; read like embeddings with one number a row."""

    kind = "cluster ids"

    def size(self) -> tuple[int, int] | None:
        """Return (n, 1), or None."""
        try:
            return len(StoredRows.of_file(self.array)), 1
        except DAMAGE:
            return None

    def fault(self, array: StoredRows, dimension: int | None) -> BadPartition | None:  # noqa: ARG002
        """Return the reason why the array cannot be used, or None."""
        if array.dtype.kind in "iu" and array.shape[1:] in ((), (1,)) and array.shape:
            return None
        rows = array.shape[0] if array.shape else 1
        return BadPartition("not a column of cluster ids", f"{array.dtype} {list(array.shape)}", rows)


def find_cluster_ids(folder: Path) -> list[ClusterIds]:
    """Return the files of cluster ids in a folder of clip-retrieval's layout, in numeric order."""
    return [ClusterIds(*pair) for pair in numbered_files(folder, FOLDERS["image"], "_indices.npy")]
