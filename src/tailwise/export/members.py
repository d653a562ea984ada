"""The members of samples, as bytes, from their tars."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tailwise.shards.ranges import ADJACENT_BYTES, ShardStore

Members = tuple[bytes | None, ...]
Content = bytes | memoryview | OSError
_NEVER = np.iinfo(np.int64).max


def member_ranges(
    shards: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the byte ranges to read for samples of m members each; nearby members of a sample share a range.

    Args:
        shards: int64 [n], the shard of each sample.
        starts: int64 [n, m], first byte of each member.
        sizes: int64 [n, m], bytes; −1 for a missing member. Every sample has at least one member.

    Returns:
        int64 [r, 3] of (shard, start, stop); and int64 [n, m], the range of each member (meaningless if it is missing).
    """
    there = sizes >= 0
    order = np.argsort(np.where(there, starts, _NEVER), axis=1, kind="stable")
    known = np.take_along_axis(there, order, axis=1)
    start: npt.NDArray[np.int64] = np.take_along_axis(starts, order, axis=1)
    size: npt.NDArray[np.int64] = np.take_along_axis(sizes, order, axis=1)
    reach = np.maximum.accumulate(np.where(known, start + size, -1), axis=1)
    begins = known.copy()
    begins[:, 1:] &= start[:, 1:] - reach[:, :-1] > ADJACENT_BYTES
    first = np.flatnonzero(begins)
    last = np.append(first[1:], begins.size) - 1  # missing members are last, and extend no range
    shard = np.repeat(shards, starts.shape[1])
    ranges = np.stack([shard[first], start.ravel()[first], reach.ravel()[last]], axis=1)
    number = np.empty_like(starts)
    np.put_along_axis(number, order, np.cumsum(begins).reshape(starts.shape) - 1, axis=1)
    return ranges, number


def read_members(
    store: ShardStore, shards: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> list[Members | OSError]:
    """Return the members of each sample: None for a missing one, an OSError for a sample that cannot be read.

    Reads in ascending order of (shard, offset), in any order of the samples. The arguments are those of `member_ranges`.
    """
    ranges, number = member_ranges(shards, starts, sizes)
    order = np.lexsort((ranges[:, 1], ranges[:, 0]))
    contents: list[Content] = [b""] * len(ranges)
    for at, content in zip(order.tolist(), store.read_many(ranges[order]), strict=True):
        contents[at] = content
    begin = starts - ranges[number, 1]
    cuts = np.stack([number, begin, begin + sizes, sizes], axis=2)
    return [_cut(contents, sample) for sample in cuts.tolist()]


def _cut(contents: list[Content], sample: list[list[int]]) -> Members | OSError:
    members: list[bytes | None] = []
    for number, start, stop, size in sample:
        content = contents[number]
        if size < 0:
            members.append(None)
        elif isinstance(content, OSError):
            return content
        else:
            members.append(bytes(content[start:stop]))
    return tuple(members)
