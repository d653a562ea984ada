"""Thumbnails of samples. Images are decoded and encoded again: no byte of a file from the web gets into an output."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.loader.pool import DEFAULT_CACHE_BYTES, own_cache_folder
from tailwise.shards.containers import containers_of
from tailwise.shards.decode import ImageError, decode_rgb
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.packed import packed_shards
from tailwise.shards.ranges import ShardStore, open_shards

PIXELS = 96  # of a thumbnail's longer side
QUALITY = 70
PLACES = ["shard", "image_offset", "image_bytes"]  # columns of samples with the places of their images
READ_TOGETHER = 256
ABSENT, COMPRESSED = "no image in the shard", "the tar is compressed: `tailwise unpack` makes it readable"
_DETAIL_LETTERS = 300


class Thumbnails:
    """Thumbnails of a catalog's samples."""

    def __init__(self, catalog: Catalog, snapshot: Snapshot | None = None, image_format: str = "WEBP") -> None:
        """Open the shards of a snapshot, by default the newest; `image_format` is a name of Pillow's."""
        shards = comparable_shards(catalog, snapshot)
        paths = shards.column("path").to_pylist()
        packed = set(packed_shards(shards)["path"].to_pylist())
        has_bytes = [container.has_bytes for container in containers_of(shards)]
        self._without = [
            COMPRESSED if path in packed else "" if has else ABSENT for has, path in zip(has_bytes, paths, strict=True)
        ]
        self._store: ShardStore = open_shards(shards, own_cache_folder(paths), DEFAULT_CACHE_BYTES)
        self._format = image_format

    def of(self, samples: pa.Table, threads: int) -> list[bytes | str]:
        """Return a small encoded image of each sample (a table with PLACES), or the reason why there is none."""
        shards = samples.column("shard").to_numpy()
        starts, sizes = (samples.column(name).fill_null(0).to_numpy() for name in PLACES[1:])
        ranges = np.stack([shards, starts, starts + sizes], axis=1).astype(np.int64)
        order = np.lexsort((ranges[:, 1], ranges[:, 0]))
        found: list[bytes | str] = [self._without[shard] or ABSENT for shard in shards.tolist()]
        order = order[
            np.array([not self._without[shard] for shard in shards[order].tolist()], bool) & (sizes[order] > 0)
        ]
        with ThreadPoolExecutor(threads) as pool:
            for start, stop in pairwise([*range(0, len(order), READ_TOGETHER), len(order)]):
                contents = list(self._store.read_many(ranges[order[start:stop]]))
                for at, thumbnail in zip(order[start:stop].tolist(), pool.map(self._small, contents), strict=True):
                    found[at] = thumbnail
        return found

    def _small(self, content: bytes | memoryview | OSError) -> bytes | str:
        if isinstance(content, OSError):
            named = content.filename and content.strerror  # without the number
            return (f"{content.filename}: {content.strerror}" if named else str(content))[:_DETAIL_LETTERS]
        try:
            image = decode_rgb(bytes(content))
        except ImageError as error:
            return error.reason
        image.thumbnail((PIXELS, PIXELS))
        stream = io.BytesIO()
        image.save(stream, self._format, quality=QUALITY)
        return stream.getvalue()
