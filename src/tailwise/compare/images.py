"""A pool's images and captions, decoded once for all runs (for small pools whose pixels fit on a disk), and batches of them.

N samples. Batches are those of the loader, and their images are those that open_clip's trainer would get.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.files import digest, read_array, write_array
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.dataset import BatchDataset, Tokenizer, Transform
from tailwise.loader.order import Order
from tailwise.shards.decode import ImageError, decode_rgb
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.packed import packed_shards, refuse_packed
from tailwise.shards.ranges import open_shards, read_samples
from tailwise.storage.local import locked, replacing

FORMAT = 2
CHUNK_ROWS = 1024
MOST_BYTES = 64_000_000_000
PIXELS, CAPTIONS, SAMPLES = "pixels.bin", "captions.bin", "samples.npy"


class DecodedPool:
    """The decoded pool, memory-mapped. Can be pickled."""

    def __init__(self, folder: Path) -> None:
        """Map the files of a folder that `decoded_pool` has written."""
        self._folder = folder

    def __reduce__(self) -> tuple[type[DecodedPool], tuple[Path]]:
        return DecodedPool, (self._folder,)

    @cached_property
    def _samples(self) -> npt.NDArray[np.int64]:
        """int64 [N, 5]: first byte of the pixels, height and width (0 if unreadable), first and last byte + 1 of the caption."""
        return read_array(self._folder / SAMPLES)

    @cached_property
    def _pixels(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self._folder / PIXELS, np.uint8, "r")

    @cached_property
    def _captions(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self._folder / CAPTIONS, np.uint8, "r")

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Which samples could be decoded: bool [N]. Others, and removed ones, are replaced as in the loader."""
        return self._samples[:, 1] > 0

    def of(self, row: int) -> tuple[npt.NDArray[np.uint8], bytes] | None:
        """Return a sample's pixels, uint8 [height, width, 3], and its caption; None if it is unreadable or removed."""
        first, height, width, start, stop = self._samples[row].tolist()
        if not height:
            return None
        pixels = self._pixels[first : first + height * width * 3].reshape(height, width, 3)
        return pixels, self._captions[start:stop].tobytes()


def decoded_pool(
    catalog: Catalog,
    snapshot: Snapshot,
    folder: Path,  # cache; the files' subfolder is named by a hash of all that decides them
    *,
    most_pixels: int
    | None = None,  # bound of an image's shorter side: a larger image is made smaller; None: images stay as they are
    context: Context | None = None,
) -> DecodedPool:
    """Decode a snapshot's samples, or map the files of an earlier call with the same arguments.

    Raise a UserError if the decoded pool would exceed MOST_BYTES, or a shard can't be read.
    """
    context = context or Context()
    removals = Removals.of(catalog, snapshot, context.progress)
    place = folder / digest([FORMAT, snapshot.id, removals.id, most_pixels])
    if not (place / SAMPLES).exists():
        with locked(folder / ".lock", str(folder), wait=True):
            if not (place / SAMPLES).exists():
                _decode(catalog, snapshot, removals, place, most_pixels, context)
    return DecodedPool(place)


def _decode(
    catalog: Catalog, snapshot: Snapshot, removals: Removals, place: Path, most_pixels: int | None, context: Context
) -> None:
    """Write the three files. SAMPLES is written last: it marks the others as complete."""
    samples = np.zeros((snapshot.rows, 5), np.int64)
    with (
        replacing(place / PIXELS) as pixel_path,
        replacing(place / CAPTIONS) as caption_path,
        pixel_path.open("wb") as pixels,
        caption_path.open("wb") as captions,
    ):
        for row, encoded, caption in _contents(catalog, snapshot, removals, place, context):
            try:
                caption.decode()
                image = decode_rgb(encoded)
            except (ImageError, UnicodeDecodeError):
                continue
            if most_pixels is not None and min(image.size) > most_pixels:
                image = _smaller(image, most_pixels)
            first, start = pixels.tell(), captions.tell()
            samples[row] = first, image.height, image.width, start, start + len(caption)
            pixels.write(image.tobytes())
            captions.write(caption)
            if pixels.tell() > MOST_BYTES:
                raise UserError(
                    f"{row + 1:,} of {snapshot.rows:,} images have more than {MOST_BYTES:,} bytes decoded: set train.cache_pixels, "
                    "or use `trainer: open_clip`, which decodes during the training"
                )
        for stream in (pixels, captions):
            stream.write(bytes(not stream.tell()))  # an empty file can't be mapped
    write_array(place / SAMPLES, samples)


def _smaller(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _contents(
    catalog: Catalog, snapshot: Snapshot, removals: Removals, place: Path, context: Context
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield row, encoded image and caption of all samples that were not removed."""
    ensure_locations(catalog, snapshot, context)
    shards = comparable_shards(catalog, snapshot, context)
    refuse_packed(catalog.folder, packed_shards(shards)["path"].to_pylist())
    ends, locations = np.cumsum(shards.column("rows").to_numpy()), Locations(catalog, snapshot)
    with closing(open_shards(shards, place, MOST_BYTES)) as store:
        for start in context.progress(range(0, snapshot.rows, CHUNK_ROWS), "decoding the pool"):
            rows = np.arange(start, min(start + CHUNK_ROWS, snapshot.rows))
            rows = rows[removals.keeps(rows)]
            homes = np.searchsorted(ends, rows, "right").astype(np.int32)
            contents = read_samples(store, homes, locations.of(rows), locations.fields)
            for row, content in zip(rows.tolist(), contents, strict=True):
                if isinstance(content, OSError):
                    remedy = "restore its shard, or `tailwise relocate` it"
                    raise UserError(f"row {row:,} can't be read ({content}): {remedy}")
                yield row, *content


class DecodedBatches(BatchDataset):
    """The loader's batches, from the decoded pool."""

    def __init__(
        self,
        order: Order,
        pool: DecodedPool,
        removals: Removals,
        transform: Transform,
        tokenizer: Tokenizer,
    ) -> None:
        """Take an order, and the transform of images, as in `tailwise.Loader`."""
        unused: Any = None  # nothing is read from the shards
        decode: Any = Image.fromarray
        super().__init__(order, unused, unused, {}, removals, 0, 1, decode, transform, tokenizer, replaces=True)
        self._pool = pool

    def _want_next(self, number: int) -> None:
        """Fetch nothing ahead."""

    def _read(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        return [self._pool.of(row) or "removed or unreadable" for row in rows.tolist()]
