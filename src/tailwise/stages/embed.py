"""Embed (map): from the shards' images to an embedding column."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tailwise.catalog.catalog import LOCK, Catalog, Part
from tailwise.catalog.embeddings import normalise_rows, open_column, part_marker, write_part
from tailwise.catalog.locks import locked
from tailwise.catalog.schema import has_bytes
from tailwise.encoders import find_encoder
from tailwise.errors import UserError
from tailwise.executors.local import map_ordered
from tailwise.progress import Track, silent
from tailwise.stages.report import Rejections

CHUNK_IMAGES = 512
# What Pillow's readers are known to raise on damaged files, beside their own error (an OSError).
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class _Chunk:
    """Images of one shard: where they lie."""

    encoder: str
    path: str
    keys: list[str]
    offsets: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class _Embedded:
    """float16 [n, d], zeros for images that can't be read, and the fault of each such image by index."""

    rows: npt.NDArray[np.float16]
    faults: dict[int, str]


@dataclass
class EmbedReport:
    """What embedding came to.

    Attributes:
        embedded: samples that got an embedding.
        lacking: samples that had none before.
        rejections: what could not be embedded.
    """

    embedded: int
    lacking: int
    rejections: Rejections


def embed(catalog: Catalog, encoder_name: str, *, workers: int | None = None, track: Track = silent) -> EmbedReport:
    """Fills the image embeddings of those parts of the newest snapshot that have none yet.

    Args:
        catalog: with samples.
        encoder_name: a name of ENCODERS.
        workers: processes; None for one a processor. The result doesn't depend on it.
        track: shows progress.

    Raises:
        UserError: unknown encoder, the column was made by another one, a shard is gone, or no image could be read.
    """
    encoder = find_encoder(encoder_name)
    with locked(catalog.folder / LOCK, str(catalog.folder)):
        open_column(catalog, "image", encoder.dimension, encoder_name)
        paths: list[str] = catalog.shards().column("path").to_pylist()
        lacking = [part for part in catalog.parts() if not part_marker(catalog, "image", part).exists()]
        _require_bytes(catalog, lacking)
        report = EmbedReport(0, sum(part.rows for part in lacking), Rejections())
        for part in lacking:
            chunks = list(_chunks(catalog, part, paths, encoder_name))
            results = track(map_ordered(_embed_chunk, chunks, workers), f"embedding {part.name}", len(chunks))
            listed = catalog.folder / "rejected" / f"embed-{part.name}.parquet"
            rows = _noted(zip(chunks, results, strict=True), report.rejections, listed)
            report.embedded += write_part(catalog, "image", part, encoder.dimension, rows)
    if report.lacking and not report.embedded:
        raise UserError(f"not one of {report.lacking:,} images could be read: see {report.rejections.files[0]}")
    return report


def _require_bytes(catalog: Catalog, parts: list[Part]) -> None:
    """Refuses parts with samples that have no image."""
    shards = catalog.shards()
    lacking = {part.number for part in parts}
    columns = (shards.column(name).to_pylist() for name in ("path", "part", "rows"))
    tables = [
        (path, rows) for path, part, rows in zip(*columns, strict=True) if part in lacking and not has_bytes(path)
    ]
    if tables:
        raise UserError(
            f"{sum(rows for _, rows in tables):,} samples in {len(tables):,} file(s) of metadata have no image to embed, the first "
            f"file is {tables[0][0]}: import their embeddings (DataComp's .npz files), or the tars in its place"
        )


def _chunks(catalog: Catalog, part: Part, paths: list[str], encoder: str) -> Iterator[_Chunk]:
    samples = catalog.samples(part, ["shard", "key", "image_offset", "image_bytes"])
    shards = samples.column("shard").to_numpy()
    edges = np.flatnonzero(np.diff(shards, prepend=-1, append=-1))
    for begin, end in pairwise(edges):
        for start in range(begin, end, CHUNK_IMAGES):
            rows = samples.slice(start, min(CHUNK_IMAGES, end - start))
            columns = (rows.column(name).to_pylist() for name in ("key", "image_offset", "image_bytes"))
            yield _Chunk(encoder, paths[shards[begin]], *columns)


def _embed_chunk(chunk: _Chunk) -> _Embedded:
    encoder = find_encoder(chunk.encoder)
    faults: dict[int, str] = {}
    images: list[Image.Image] = []
    good: list[int] = []
    with _opened(chunk.path) as stream:
        for at, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            stream.seek(offset)
            try:
                images.append(Image.open(io.BytesIO(stream.read(size))).convert("RGB"))
                good.append(at)
            except UnidentifiedImageError:  # whose message holds an address in memory
                faults[at] = "of no known format"
            except _UNREADABLE as error:
                faults[at] = str(error) or type(error).__name__
    rows = np.zeros((len(chunk.keys), encoder.dimension), np.float32)
    if images:
        rows[good] = encoder.encode(images)
    scaled, unfit = normalise_rows(rows)
    return _Embedded(scaled, {**{at: f"the encoder gave {fault}" for at, fault in unfit.items()}, **faults})


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        opened = fsspec.open(path, "rb").open()
    except OSError as error:
        raise UserError(
            f"the shard {path} can't be read ({error}); if it has moved, use `tailwise relocate`"
        ) from error
    with opened as stream:
        yield stream


def _noted(
    results: Iterable[tuple[_Chunk, _Embedded]], rejections: Rejections, listed: Path
) -> Iterator[npt.NDArray[np.float16]]:
    """The rows; the list of what could not be embedded is on disk when the last is taken, before the part's marker."""
    with rejections.writer(listed) as log:
        for chunk, result in results:
            for at, fault in sorted(result.faults.items()):
                log.add("embed", "unreadable image", chunk.path, chunk.keys[at], fault)
            yield result.rows
