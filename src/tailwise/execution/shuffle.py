"""Regroup: ranks inside clusters by a value, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tailwise.catalog.files import create_array
from tailwise.catalog.layout import SPILL
from tailwise.kernels.ranks import value_ranks
from tailwise.storage.local import scratch

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

    Rows are first spilled into files by cluster, those of a cluster of more than `bucket_rows` again by value, then ranked file by file.
    Memory is bounded by `bucket_rows`, at about 60 bytes a row.

    Args:
        path: of the file.
        sizes: int64 [K], members of each cluster.
        columns: labels int32 [n] (negative: no cluster, rank 0) and values float32 [n], part by part.
        bucket_rows: rows ranked at a time; the result doesn't depend on it.
    """
    total = 0
    buckets = cluster_buckets(sizes, bucket_rows)
    with scratch(path.with_name(path.name + SPILL)) as spill:
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
        for bucket_path in list(spill.iterdir()):
            _rank(bucket_path, ranks, bucket_rows)


def _rank(path: Path, ranks: npt.NDArray[np.uint32], bucket_rows: int, first: int = 0, shift: int = 16) -> None:
    """Ranks the records of one file, from rank `first` on; a cluster too large is split by 16 bits of its values, from `shift` on."""
    count = path.stat().st_size // _RECORD.itemsize
    if count <= bucket_rows or shift < 0:
        for start in range(0, count, bucket_rows):  # more than one piece only of equal values, which come by row
            records = np.fromfile(path, _RECORD, bucket_rows, offset=start * _RECORD.itemsize)
            ranks[records["row"]] = first + start + value_ranks(records["label"], records["value"])
        path.unlink()
        return
    records = np.memmap(path, _RECORD, mode="r")
    sizes = np.zeros(1 << 16, np.int64)
    for start in range(0, count, bucket_rows):
        sizes += np.bincount(_digits(records["value"][start : start + bucket_rows], shift), minlength=len(sizes))
    pieces = cluster_buckets(sizes, bucket_rows)
    for start in range(0, count, bucket_rows):
        chunk = records[start : start + bucket_rows]
        target = pieces[_digits(chunk["value"], shift)]
        for piece in np.unique(target):
            with path.with_name(f"{path.name}.{piece}").open("ab") as stream:
                stream.write(chunk[target == piece].tobytes())
    del records, chunk
    path.unlink()
    for piece in np.unique(pieces[sizes > 0]):
        several = np.count_nonzero(sizes[pieces == piece]) > 1  # then it isn't too large
        _rank(path.with_name(f"{path.name}.{piece}"), ranks, bucket_rows, first, shift if several else shift - 16)
        first += int(sizes[pieces == piece].sum())


def _digits(values: npt.NDArray[np.float32], shift: int) -> npt.NDArray[np.int64]:
    """16 bits of each value, from `shift` on, of the number that orders floats as they are: int64 [n]."""
    bits = (values + np.float32(0)).view(np.uint32)  # −0 is 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    digits: npt.NDArray[np.int64] = ((ordered >> shift) & 0xFFFF).astype(np.int64)
    return digits


def cluster_buckets(sizes: npt.NDArray[np.int64], bucket_rows: int) -> npt.NDArray[np.int64]:
    """The bucket of each cluster: consecutive clusters, at most `bucket_rows` rows unless a single cluster has more."""
    buckets = np.zeros(len(sizes), np.int64)
    bucket = filled = 0
    for cluster, size in enumerate(sizes.tolist()):
        if filled and filled + size > bucket_rows:
            bucket, filled = bucket + 1, 0
        buckets[cluster] = bucket
        filled += size
    return buckets
