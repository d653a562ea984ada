"""Embed (map): from the shards' images to an embedding column."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import fsspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import normalise_rows, open_column, write_part
from tailwise.encoders import find_encoder
from tailwise.errors import UserError
from tailwise.executors.local import map_ordered
from tailwise.progress import Track, silent
from tailwise.stages.report import Rejections, RejectionWriter

CHUNK_IMAGES = 512


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


def embed(
    catalog: Catalog, encoder_name: str, *, workers: int | None = None, track: Track = silent
) -> tuple[int, int, Rejections]:
    """Fills the image embeddings of those parts of the newest snapshot that lack them.

    Args:
        catalog: with samples.
        encoder_name: a name of ENCODERS.
        workers: processes; None for one a processor. The result doesn't depend on it.
        track: shows progress.

    Returns:
        How many samples got an embedding, how many lacked one before, and what could not be embedded.

    Raises:
        UserError: unknown encoder, the column was made by another one, a shard is gone, or no image could be read.
    """
    encoder = find_encoder(encoder_name)
    open_column(catalog, "image", encoder.dimension, encoder_name)
    folder = catalog.embedding_folder("image")
    lacking = [part for part in catalog.parts() if not (folder / f"{part.name}.json").exists()]
    rejections = Rejections()
    embedded = 0
    for part in lacking:
        with rejections.writer(catalog.folder / "rejected" / f"embed-{part.name}.parquet") as log:
            chunks = list(_chunks(catalog, part, encoder_name))
            results = track(map_ordered(_embed_chunk, chunks, workers), f"embedding {part.name}", len(chunks))
            rows = (_noted(chunk, result, log) for chunk, result in zip(chunks, results, strict=True))
            embedded += write_part(catalog, "image", part, encoder.dimension, rows)
    wanted = sum(part.rows for part in lacking)
    if wanted and not embedded:
        raise UserError(f"not one of {wanted:,} images could be read: see {rejections.files[0]}")
    return embedded, wanted, rejections


def _chunks(catalog: Catalog, part: Part, encoder: str) -> Iterator[_Chunk]:
    paths = catalog.shards().column("path").to_pylist()
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
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                faults[at] = str(error)
    rows = np.zeros((len(chunk.keys), encoder.dimension), np.float32)
    if images:
        rows[good] = encoder.encode(images)
    return _Embedded(normalise_rows(rows)[0], faults)


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


def _noted(chunk: _Chunk, result: _Embedded, log: RejectionWriter) -> npt.NDArray[np.float16]:
    for at, fault in result.faults.items():
        log.add("embed", "unreadable image", chunk.path, chunk.keys[at], fault)
    return result.rows
