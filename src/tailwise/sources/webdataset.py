"""img2dataset-style webdataset shards: `{key}.jpg|jpeg|png|webp`, `{key}.txt`, `{key}.json`, and a sidecar `{shard}.parquet`."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa

from tailwise.catalog.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA
from tailwise.sources.sidecar import SIDES, parse_uid, read_sidecar
from tailwise.sources.tar import Member, TarIndex, index_tar
from tailwise.storage.files import open_binary
from tailwise.storage.remote import is_remote

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Record = dict[str, Any]


@dataclass
class ShardContent:
    """What one tar holds.

    Attributes:
        samples: SAMPLE_SCHEMA plus score columns, without `shard` and `uid` where the source gives none (null).
        rejected: REJECTED_SCHEMA.
        size_bytes: of the tar.
        index_checksum: 128-bit hash over names, offsets and sizes of all members.
    """

    samples: pa.Table
    rejected: pa.Table
    size_bytes: int
    index_checksum: str


@dataclass
class _Grouped:
    """The members of a tar by key, in order of first appearance."""

    groups: dict[str, dict[str, Member]] = field(default_factory=dict)
    rejected: list[Record] = field(default_factory=list)


def read_shard(path: str) -> ShardContent:
    """Indexes one tar, with its captions, JSON files and sidecar.

    Args:
        path: a local path or any fsspec URL.

    Returns:
        The samples that have an image and a caption; all else by reason, a file that can't be read among it.
    """
    try:
        return _read_shard(path)
    except OSError as error:
        return unreadable_shard(path, str(error))


def unreadable_shard(path: str, cause: str) -> ShardContent:
    """Returns what a tar holds that can't be read: nothing but the reason."""
    unreadable = {**_rejection(path, "unreadable tar", None, cause), "rows": 0}
    nothing = pa.Table.from_pylist([], schema=_schema({}))
    return ShardContent(nothing, pa.Table.from_pylist([unreadable], schema=REJECTED_SCHEMA), 0, "")


def _read_shard(path: str) -> ShardContent:
    with _opened(path) as (stream, size_bytes):
        index = index_tar(stream, size_bytes)
        grouped = _group(index, path)
        sidecar = read_sidecar(path, grouped.groups)
        grouped.rejected += sidecar.rejected
        samples = list(_samples(grouped, stream, sidecar.rows, path))
    table = pa.Table.from_pylist(samples, schema=_schema(sidecar.rows))
    rejected = pa.Table.from_pylist(grouped.rejected, schema=REJECTED_SCHEMA)
    return ShardContent(table, rejected, size_bytes, _index_checksum(index))


@contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, int]]:
    with open_binary(path) as stream:
        size_bytes = stream.seek(0, 2)
        if is_remote(path) or size_bytes == 0:
            yield stream, size_bytes
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield cast("BinaryIO", mapped), size_bytes


def checksum_shard(path: str) -> tuple[int, str]:
    """The size and the index checksum of a tar, as `read_shard` notes them, from its headers alone.

    Args:
        path: a local path or any fsspec URL.

    Returns:
        `size_bytes` and `index_checksum` of ShardContent.

    Raises:
        OSError: it can't be read.
    """
    with _opened(path) as (stream, size_bytes):
        return size_bytes, _index_checksum(index_tar(stream, size_bytes))


def _index_checksum(index: TarIndex) -> str:
    text = "\n".join(f"{name}\t{offset}\t{size}" for name, offset, size in index.members)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset cuts them: at the first dot of the base name; the key keeps the folders."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


def _rejection(path: str, reason: str, key: str | None, detail: str | None = None) -> Record:
    safe_key = key if key is None or _is_utf8(key) else ascii(key)
    return {"stage": "import", "reason": reason, "file": path, "key": safe_key, "detail": detail, "rows": 1}


def _group(index: TarIndex, path: str) -> _Grouped:
    grouped = _Grouped()
    groups = grouped.groups
    current = None
    duplicate = False
    for member in index.members:
        key, extension = split_name(member.name)
        if key != current or (not duplicate and extension in groups[key]):
            current = key
            duplicate = key in groups
            if duplicate:
                grouped.rejected.append(_rejection(path, "duplicate key", key, "the first sample of this key is kept"))
            else:
                groups[key] = {}
        if not duplicate:
            groups[key].setdefault(extension, member)
    if index.damage:
        _reject_damage(grouped, index, path)
    elif not index.ended:
        what = "all in it is kept; it may have been cut off behind" if index.members else "it is empty"
        grouped.rejected.append(_rejection(path, "tar without an end", None, what))
    return grouped


def _reject_damage(grouped: _Grouped, index: TarIndex, path: str) -> None:
    """Drops the sample that the damage cuts; without its name, it is the last one, if that lacks its image or caption."""
    key = split_name(index.damaged_name)[0] if index.damaged_name is not None else next(reversed(grouped.groups), None)
    reason = "truncated or damaged tar" if index.members or index.damaged_name else "not a tar"
    members = grouped.groups.get(key) if key is not None else None
    if members is not None and key is not None and (image_of(members) is None or "txt" not in members):
        del grouped.groups[key]
    elif index.damaged_name is None:
        key = None
    grouped.rejected.append(_rejection(path, reason, key, index.damage))


def image_of(members: dict[str, Member]) -> str | None:
    """The extension of a sample's image: the first of IMAGE_EXTENSIONS that is there and not empty."""
    return next((name for name in IMAGE_EXTENSIONS if name in members and members[name].size), None)


def _samples(grouped: _Grouped, stream: BinaryIO, sidecar: dict[str, Record], path: str) -> Iterator[Record]:
    for key, members in grouped.groups.items():
        extension = image_of(members)
        text = members.get("txt")
        if extension is None and text is None:
            there = ", ".join(f".{name}" for name in members)
            grouped.rejected.append(_rejection(path, "neither image nor caption", key, f"only {there}"))
            continue
        if extension is None or text is None:
            reason = "caption without image" if extension is None else "image without caption"
            grouped.rejected.append(_rejection(path, reason, key))
            continue
        if not _is_utf8(key):
            grouped.rejected.append(_rejection(path, "key is not UTF-8", key))
            continue
        if "\n" in key or "\r" in key:
            grouped.rejected.append(_rejection(path, "key holds a line break", key))
            continue
        try:
            caption = _read(stream, text).decode()
        except UnicodeDecodeError as error:
            grouped.rejected.append(_rejection(path, "caption is not UTF-8", key, str(error)))
            continue
        image = members[extension]
        record: Record = {
            "key": key,
            "caption": caption,
            "image_extension": extension,
            "image_offset": image.offset,
            "image_bytes": image.size,
            "caption_offset": text.offset,
            "caption_bytes": text.size,
        }
        description = members.get("json")
        if description is not None:
            record["json_offset"], record["json_bytes"] = description.offset, description.size
            record.update(_from_json(_read(stream, description)))
        record.update(sidecar.get(key, {}))
        yield record


def _is_utf8(name: str) -> bool:
    """Whether a member's name came from valid UTF-8 (other bytes are held as lone surrogates)."""
    return name.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _read(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.size)


def _from_json(content: bytes) -> Record:
    """Width, height and uid, where the JSON has them; a broken or foreign JSON gives nothing, since none of it is needed."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    found: Record = {name: int(value[name]) for name in SIDES if _is_side(value.get(name))}
    uid = parse_uid(value.get("uid"))
    return {**found, "uid": uid} if uid else found


def _is_side(value: object) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and 0 < value < 2**31  # type: ignore[operator]


def hashed_uid(shard: int, key: str) -> bytes:
    """The uid of a sample whose source gives none: a 128-bit hash of (shard id, key)."""
    return hashlib.blake2b(f"{shard}\t{key}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _schema(sidecar: dict[str, Record]) -> pa.Schema:
    known = {*SAMPLE_SCHEMA.names}
    return samples_schema(sorted({name for row in sidecar.values() for name in row} - known))


def samples_schema(scores: list[str]) -> pa.Schema:
    """The columns of a ShardContent's samples."""
    base = [item.with_nullable(True) if item.name in {"shard", "uid"} else item for item in SAMPLE_SCHEMA]
    return pa.schema([*base, *(pa.field(name, pa.float64()) for name in scores)])
