"""Regroup: ranks inside clusters by a value, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import create_array, scratch
from tailwise.kernels.ranks import value_ranks

BUCKET_ROWS = 16_000_000
_RECORD = np.dtype([("row", "<i8"), ("label", "<i4"), ("value", "<f4")])


def write_value_ranks(
    path: Path,
    sizes: npt.NDArray[np.int64],
    columns: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
    *,
    bucket_rows: int = BUCKET_ROWS,
) -> None:
    """Writes the in-cluster rank of every row by ascending value, ties by row: uint32 [N], a `.npy` file.

    Rows are first spilled into files by cluster, then ranked file by file. Memory is bounded by the larger of `bucket_rows` and
    the largest cluster, at about 60 bytes a row.

    Args:
        path: of the file.
        sizes: int64 [K], members of each cluster.
        columns: labels int32 [n] (negative: no cluster, rank 0) and values float32 [n], part by part.
        bucket_rows: rows ranked at a time; the result doesn't depend on it.
    """
    total = 0
    buckets = _buckets(sizes, bucket_rows)
    with scratch(path.with_name(path.name + ".spill")) as spill:
        for labels, values in columns:
            members = np.flatnonzero(labels >= 0)
            records = np.empty(len(members), _RECORD)
            records["row"], records["label"], records["value"] = total + members, labels[members], values[members]
            target = buckets[records["label"]]
            for bucket in np.unique(target):
                with (spill / str(bucket)).open("ab") as stream:
                    stream.write(records[target == bucket].tobytes())
            total += len(labels)
        ranks = create_array(path, (total,), np.uint32)
        for bucket_path in spill.iterdir():
            records = np.fromfile(bucket_path, _RECORD)
            ranks[records["row"]] = value_ranks(records["label"], records["value"])


def _buckets(sizes: npt.NDArray[np.int64], bucket_rows: int) -> npt.NDArray[np.int64]:
    """The bucket of each cluster: consecutive clusters, at most `bucket_rows` rows unless a single cluster has more."""
    buckets = np.zeros(len(sizes), np.int64)
    bucket = filled = 0
    for cluster, size in enumerate(sizes.tolist()):
        if filled and filled + size > bucket_rows:
            bucket, filled = bucket + 1, 0
        buckets[cluster] = bucket
        filled += size
    return buckets
