"""The DynamiCS authors' files: clip-retrieval's layout, with the cluster of each row in `img_emb_{p}_indices.npy`.

Liang, Liu, de Vries, Larson: "Dynamic Cluster Data Sampling", ECCV 2026. Their `image_path` is `{tar path}/{key}.jpg`.
"""

from __future__ import annotations

from pathlib import Path

from tailwise.sources.clip_retrieval import FOLDERS, NamedArray, numbered_files, read_names_of
from tailwise.sources.columns import DAMAGE, count_rows
from tailwise.sources.embedding_files import BadPartition, Opened
from tailwise.sources.stored_rows import StoredRows


class ClusterIds(NamedArray):
    """The cluster of each row of one partition, integers [n] or [n, 1]; read like a file of embeddings with one number a row."""

    def size(self) -> tuple[int, int] | None:
        """(n, 1), or None."""
        try:
            return len(StoredRows.of_file(self.array)), 1
        except DAMAGE:
            return None

    def open(self, dimension: int | None, unpacked: Path) -> Opened | BadPartition:  # noqa: ARG002
        """Looks at the array's header, and reads the names."""
        try:
            array = StoredRows.of_file(self.array)
        except DAMAGE as error:
            return BadPartition("unreadable cluster ids", str(error), count_rows(self.metadata))
        if array.dtype.kind not in "iu" or array.shape[1:] not in ((), (1,)):
            rows = array.shape[0] if array.shape else 1
            return BadPartition("not a column of cluster ids", f"{array.dtype} {list(array.shape)}", rows)
        names = read_names_of(self.metadata, len(array))
        return names if isinstance(names, BadPartition) else Opened(array.as_column(), [names])

    def rows(self, unpacked: Path) -> StoredRows:  # noqa: ARG002
        """The ids [n, 1]."""
        return StoredRows.of_file(self.array).as_column()


def find_cluster_ids(folder: Path) -> list[ClusterIds]:
    """The files of cluster ids in a folder of clip-retrieval's layout, in numeric order."""
    return [ClusterIds(*pair) for pair in numbered_files(folder, FOLDERS["image"], "_indices.npy")]
