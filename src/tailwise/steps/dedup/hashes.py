"""Hashes of all images of a snapshot: the SHA-256 of the encoded bytes, or of the decoded pixels. Made once, and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import digest
from tailwise.catalog.kinds import HASHES
from tailwise.context import Context
from tailwise.encoders.encoder import Fault, Inputs
from tailwise.execution.base import KERNEL, Fill, Worker
from tailwise.extras import versions
from tailwise.shards.decode import ImageError, decode_rgb
from tailwise.steps.embedding.embed import require_bytes
from tailwise.steps.embedding.read import ShardRows, read_batches

HASHED = ("bytes", "pixels")
BATCH_ROWS = 64
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class HashImages:
    """Returns the hashes of encoded images, as an encoder's `prepare`: the tensor "hash", int64 [n, 2], of those that can be decoded.

    A hash is the first 128 bits of a SHA-256: of the bytes; or of width, height and the RGB values of `decode_rgb`, row by row.
    """

    of: str  # "bytes" or "pixels"

    def __call__(self, items: Sequence[bytes]) -> Inputs:
        """Return the inputs."""
        found = [self._hash(content) for content in items]
        faults = {
            at: Fault(error.reason, error.detail) for at, error in enumerate(found) if isinstance(error, ImageError)
        }
        joined = bytearray(b"".join(item for item in found if isinstance(item, bytes)))
        return Inputs({"hash": torch.from_numpy(np.frombuffer(joined, np.int64).reshape(-1, 2))}, faults)

    def _hash(self, content: bytes) -> bytes | ImageError:
        if self.of == "bytes":
            return hashlib.sha256(content).digest()[:16]
        try:
            image = decode_rgb(content)
        except ImageError as error:
            return error
        state = hashlib.sha256(f"{image.width} {image.height}\n".encode())
        state.update(image.tobytes())
        return state.digest()[:16]


def _hashes(folder: Path, of: str, part: Part, worker: Worker) -> Hashes:
    """Return the hashes of a part of the catalog in a folder."""
    catalog = Catalog.open(folder)
    shards, replaced = catalog.shards(), catalog.replaced()
    shards = shards.filter(pc.equal(shards["part"], part.number))
    items, first = list[ShardRows](), 0
    for shard, rows in zip(shards["shard"].to_pylist(), shards["rows"].to_pylist(), strict=True):
        items += [] if shard in replaced else [ShardRows(shard, part.number, first, rows)]
        first += rows
    hashes = np.zeros((part.rows, 2), np.uint64)
    for batch in read_batches(folder, "image", HashImages(of), items, BATCH_ROWS, workers=worker.cpus):
        start = batch.piece.of.first + batch.piece.start
        hashes[start + batch.fit] = batch.tensors["hash"].numpy().view(np.uint64)
    return hashes


def hash_images(catalog: Catalog, snapshot: Snapshot, of: str, context: Context) -> PartColumn:
    """Return the column of hashes of all images of a snapshot: uint64 [rows, 2] a part, zeros where an image cannot be decoded.

    `of`: one of HASHED.

    Raises:
        UserError: a shard can't be read, or samples have no bytes.
    """
    parts = catalog.parts(snapshot)
    decoder = versions(("pillow",))["pillow"] if of == "pixels" else None  # another one may round otherwise
    config = {"of": of, "snapshot": snapshot.number, "decoder": decoder}
    inputs = {"snapshot": snapshot.id}
    folder = HASHES.path(catalog.folder, f"{of}-{digest([config, inputs])[:12]}")
    with Artifact(folder, "hashes", config, inputs) as artifact:
        if not artifact.done:
            column = PartColumn(artifact.folder, layout.HASH)
            require_bytes(catalog, parts, instead="; or compare embeddings (`epsilon`)")
            context.run(Fill(column, partial(_hashes, catalog.folder, of)), parts, f"hashing {of}", KERNEL)
            artifact.finish({"samples": snapshot.rows})
    return PartColumn(artifact.folder, layout.HASH)


def has_hash(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Return which hashes [n, 2] are there: bool [n]."""
    return np.asarray(hashes.any(axis=1))
