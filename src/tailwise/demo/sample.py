"""A bounded sample of a user's pool: whole tars or metadata files; the last tar is cut after the last sample that fits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.errors import UserError
from tailwise.shards.containers import index_shard
from tailwise.sources import find
from tailwise.storage.remote import is_remote

BLOCK_BYTES = 512  # of a tar; two empty blocks end it
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class PoolSample:
    """Sources of an import with a bounded number of samples."""

    sources: list[str]  # paths for `tailwise import`
    samples: int  # number of samples in the sources
    files: int  # number of tars or metadata files among the sources
    pool_files: int  # number of tars or metadata files in the whole pool
    has_images: bool  # True if the samples have images
    has_embeddings: bool  # True if the pool has embeddings of the images


def take_sample(paths: Sequence[str], samples: int, folder: Path) -> PoolSample:
    """Choose files of a pool, in a seeded random order, until they hold `samples` samples.

    A single metadata file may hold more. `folder` is for the tar that is cut; it is created if needed. Raise a UserError if there is
    nothing to import, or the pool is remote.
    """
    found = find(paths)
    if any(is_remote(path) for path in found.tars):
        raise UserError(
            "the demo samples local pools: copy some shards here, or run `tailwise import` on the whole pool"
        )
    if not found.tars and not found.metadata:
        raise UserError(f"{' '.join(paths)} holds embeddings and no shards: add their folder")
    pool = sorted(found.tars or found.metadata)
    random.Random(0).shuffle(pool)
    chosen, total = _tars(pool, samples, folder) if found.tars else _tables(pool, samples)
    if not total:
        raise UserError(f"{' '.join(paths)} holds no usable samples: `tailwise import` lists the reasons")
    # Embedding files that are not in metadata files; those in clip-retrieval's layout as folders.
    files = {Path(file.path) for files in found.embeddings.values() for file in files}
    sources = {path.parent.parent for path in files if path.suffix == ".npy"}
    sources |= {path for path in files if path.suffix == ".parquet"}
    has_images, has_embeddings = bool(found.tars), bool(found.embeddings.get("image"))
    embeddings = sorted(map(str, sources))
    return PoolSample([*sorted(chosen), *embeddings], total, len(chosen), len(pool), has_images, has_embeddings)


def _tars(pool: Sequence[str], samples: int, folder: Path) -> tuple[list[str], int]:
    chosen: list[str] = []
    total = 0
    for path in pool:
        rows = index_shard(path).samples
        if rows.num_rows == 0:
            continue
        take = min(rows.num_rows, samples - total)
        chosen.append(path if take == rows.num_rows else _cut(path, rows.slice(0, take), folder))
        total += take
        if total == samples:
            break
    return chosen, total


def _cut(path: str, rows: pa.Table, folder: Path) -> str:
    """Copy a tar up to the last of some samples, and end the copy there."""
    kinds = ("image", "caption", "json")
    ends = [pc.max(pc.add(rows[f"{kind}_offset"], rows[f"{kind}_bytes"])).as_py() or 0 for kind in kinds]
    whole = -(-max(ends) // BLOCK_BYTES) * BLOCK_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(path).name
    with Path(path).open("rb") as source, target.open("wb") as copy:
        for start in range(0, whole, COPY_BYTES):
            copy.write(source.read(min(COPY_BYTES, whole - start)))
        copy.write(bytes(2 * BLOCK_BYTES))
    return str(target)


def _tables(pool: Sequence[str], samples: int) -> tuple[list[str], int]:
    chosen: list[str] = []
    total = 0
    for path in pool:
        rows = pq.read_metadata(path).num_rows
        if chosen and total + rows > samples:
            continue
        chosen.append(path)
        total += rows
    return chosen, total
