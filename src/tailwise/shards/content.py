"""Samples of one file as the catalog takes them, whatever its container."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict

import pyarrow as pa

from tailwise.catalog.noted import HASH_TYPE, hash_columns
from tailwise.catalog.schema import NO_OFFSET, REJECTED_SCHEMA, SAMPLE_SCHEMA
from tailwise.shards.decode import ImageError
from tailwise.shards.grouping import MemberCounts, Record, rejection

Encoded: TypeAlias = bytes | ImageError | None  # of an image; why it is not read; there is none
Pairs: TypeAlias = Iterator[tuple[Encoded, tuple[bytes, ...] | None]]  # image and targets; None if one is missing
HARMLESS = "folder, or leftover of macOS, Windows or an archiver"  # reason of members that belong to no sample


class ParquetLayout(TypedDict):
    """Where the images and captions of a Parquet file lie; as in SHARD_SCHEMA."""

    image: str  # path of the column of images, such as "image.bytes"
    caption: str | None  # column of captions
    groups: list[int]  # bytes of images and captions of each row group


@dataclass
class ShardContent:
    """Samples of one file."""

    # SAMPLE_SCHEMA, columns of scores, and of hashes (`catalog.noted`); without `shard`, and `uid` where the source gives none (null)
    samples: pa.Table
    rejected: pa.Table  # REJECTED_SCHEMA
    size_bytes: int  # of the file
    index_checksum: str  # 128-bit hash over what the index consists of
    fingerprint: str | None = None  # of the content, see `shards.fingerprint`; None where samples have no bytes
    members: MemberCounts = field(default_factory=MemberCounts)  # seen = imported + harmless + rejected
    parquet: ParquetLayout | None = None  # of a Parquet file with images


def without_samples(reasons: Sequence[Record], size_bytes: int) -> ShardContent:
    """Return the content of a file that gives no sample, for some reasons."""
    rejected = pa.Table.from_pylist(list(reasons), schema=REJECTED_SCHEMA)
    return ShardContent(samples_schema([]).empty_table(), rejected, size_bytes, "")


def unreadable_shard(path: str, cause: str) -> ShardContent:
    """Return the content of a tar that cannot be read."""
    return without_samples([rejection(path, "unreadable tar", None, cause, rows=0)], 0)


def samples_schema(others: Sequence[str]) -> pa.Schema:
    """Return the columns of a ShardContent's samples; `others` are those of scores, and of hashes of what the source notes."""
    hashes = hash_columns(others)
    base = [item.with_nullable(True) if item.name in {"shard", "uid"} else item for item in SAMPLE_SCHEMA]
    return pa.schema([*base, *(pa.field(name, HASH_TYPE if name in hashes else pa.float64()) for name in others)])


def samples_without_bytes(columns: Mapping[str, pa.Array], others: Mapping[str, pa.Array]) -> pa.Table:
    """Return the samples of a file that has no bytes of images, as a ShardContent takes them.

    Args:
        columns: columns of SAMPLE_SCHEMA, each [n]: key and caption; uid, width and height where the file gives them.
        others: columns of scores, float64, and of hashes, each [n].
    """
    unknown = {"image_extension": "", "image_bytes": 0, "caption_bytes": 0}
    unknown |= dict.fromkeys(("image_offset", "caption_offset"), NO_OFFSET)
    schema, given = samples_schema(list(others)), {**columns, **others}
    rest = {item.name: pa.scalar(unknown.get(item.name), item.type) for item in schema if item.name not in given}
    given |= {name: pa.repeat(value, len(columns["key"])) for name, value in rest.items()}
    return pa.table([given[name] for name in schema.names], schema)


def hashed_uid(shard: int, key: str) -> bytes:
    """Return the uid of a sample whose source gives none: a 128-bit hash of (shard id, key)."""
    return hashlib.blake2b(f"{shard}\t{key}".encode("utf-8", "surrogateescape"), digest_size=16).digest()
