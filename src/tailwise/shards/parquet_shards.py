"""Parquet files with images as a store of ranges: row groups are decoded, and the ranges that are wanted are in the cache on disk.

A row group is decoded once for all ranges of it that are announced together, such as those of a block of the loader; other processes
find them in the cache. A range that was not announced brings its whole row group.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from tailwise.shards.content import ParquetLayout
from tailwise.shards.fingerprint import EVERY, SOME, shard_blocks
from tailwise.shards.parquet_images import GROUP_BYTES, RowGroups
from tailwise.shards.remote import RemoteShards
from tailwise.storage.lru import LRUCache
from tailwise.storage.remote import is_remote
from tailwise.storage.spans import Span

GAP_BYTES = 1 << 16  # that are kept between two wanted ranges: copying them takes less time than one more file
DECODING = 4  # row groups that are decoded at a time, per process; as many are kept, those included
OPEN_FOOTERS = 64
TURNS = 64  # locks, which all row groups share


class ParquetShards(RemoteShards):
    """Parquet files with images, local or remote. May be forked, pickled, and used by several threads."""

    def __init__(
        self,
        paths: Sequence[str],
        folder: str | Path,
        max_bytes: int,
        versions: Sequence[str] | None,
        sizes: Sequence[int] | None,
        fingerprints: Sequence[str | None] | None,
        layouts: Sequence[ParquetLayout | None],
    ) -> None:
        """See `RemoteShards`; a layout for each shard that is a Parquet file with images."""
        self.layouts = layouts
        super().__init__(paths, folder, max_bytes, versions, sizes, fingerprints)

    def _forget(self) -> None:
        super()._forget()
        self._footers: LRUCache[int, RowGroups] = LRUCache(OPEN_FOOTERS)
        self._decoded: LRUCache[Span, memoryview] = LRUCache(DECODING)
        self._turns = [threading.Lock() for _ in range(TURNS)]
        self._decoding = threading.Semaphore(DECODING)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "layouts": self.layouts}

    def _extent(self, shard: int, start: int, stop: int) -> Span:  # noqa: ARG002
        group = start // GROUP_BYTES
        return group * GROUP_BYTES, group * GROUP_BYTES + self._layout(shard)["groups"][group]

    def _layout(self, shard: int) -> ParquetLayout:
        layout = self.layouts[shard]
        assert layout is not None
        return layout

    def _bounds(self) -> tuple[float, float]:
        return GAP_BYTES, inf

    def _request(self, shard: int, start: int, stop: int) -> bytes:
        first, _ = self._extent(shard, start, stop)
        content = self._group(shard, first // GROUP_BYTES)
        return bytes(content[start - first : stop - first])

    def _group(self, shard: int, number: int) -> memoryview:
        """Return a decoded row group; threads that ask for the same one wait for each other."""
        with self._turns[hash((shard, number)) % TURNS]:
            return self._decoded.get((shard, number), partial(self._decode, shard, number))

    def _decode(self, shard: int, number: int) -> memoryview:
        with self._decoding:
            file = self._footers.get(shard, partial(self._footer, shard))
            content = file.content(number)
        own = self._own
        with own.lock:
            own.counts.update(requests=1, bytes=file.stored_bytes(number))
        return content

    def _footer(self, shard: int) -> RowGroups:
        path = self.paths[shard]
        with shard_blocks(path) as (found, read):
            self._comparisons.check(shard, found, read, SOME if is_remote(path) else EVERY)
        sizes = self.sizes or ()
        return RowGroups(path, sizes[shard] if found is None else found, self._layout(shard))
