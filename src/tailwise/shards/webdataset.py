"""img2dataset-style webdataset shards: `{key}.jpg|jpeg|png|webp`, `{key}.txt`, `{key}.json`, and a sidecar `{shard}.parquet`.

A `MemberChoice` names other members as image and caption.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from tailwise.catalog.noted import HASH_COLUMNS, hash_columns, noted_record
from tailwise.catalog.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA
from tailwise.shards.columns import MAX_TEXT_BYTES
from tailwise.shards.content import HARMLESS, Pairs, ShardContent, samples_schema, unreadable_shard, without_samples
from tailwise.shards.decode import ImageError, too_long
from tailwise.shards.fingerprint import blocks_of_stream, read_fingerprint
from tailwise.shards.given_index import given_index
from tailwise.shards.grouping import (
    DEFAULT,
    Grouped,
    Record,
    group_members,
    image_of,
    rejection,
    why_incomplete,
)
from tailwise.shards.members import JSON, JSON_FIELD, MemberChoice, text_at
from tailwise.shards.metadata import SIDES, parse_uid, read_sidecar
from tailwise.shards.packed import plain
from tailwise.shards.tar import MAGIC_BYTES, Member, TarIndex, compression_of, index_tar
from tailwise.storage.files import RemoteFile, open_binary, open_whole
from tailwise.storage.ranged_file import FolderFile
from tailwise.storage.remote import is_remote
from tailwise.text import is_unicode

FOUND_COLUMNS = (
    *("key", "caption", "image_extension", "image_offset", "image_bytes", "caption_offset", "caption_bytes"),
    *("json_offset", "json_bytes"),
)
OF_JSON = frozenset({*SIDES, "uid"})
HASHES = frozenset(HASH_COLUMNS.values())
MAX_JSON_BYTES = 16_000_000  # a longer one is ignored, as a broken one
MAX_KEPT_BYTES = 1 << 16  # of a text that is kept until it is needed
MAX_TARGET_BYTES = 1 << 20  # of a class number or some captions
PAIR_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # the first that a sample has, as clip_benchmark takes it


def read_shard(path: str, choice: MemberChoice = DEFAULT) -> ShardContent:
    """Return the samples of a tar that have an image and a caption; everything else by reason.

    The tar is compressed or not, at a local path or any fsspec URL.

    Values of JSON files and of the sidecar are joined. A tar that cannot be read is a reason too.
    """
    unused = Counter[str]()
    try:
        # never mapped: a mapped file that is cut meanwhile would kill the process
        with open_binary(path) as file, plain(path, file) as stream:
            size_bytes = file.seek(0, 2)
            tar_bytes, packed = _size_and_compression(stream)
            if packed:
                return without_samples([rejection(path, "compressed tar", None, packed)], size_bytes)
            index, why_walked = _index(path, stream, tar_bytes, choice)
            grouped = group_members(index, path, choice)
            if why_walked:
                grouped.rejected.append(rejection(path, "index not used", None, why_walked, rows=0))
            sidecar = read_sidecar(path, grouped.groups)
            grouped.rejected += sidecar.rejected
            reader = _Reader(grouped, stream, path, choice, unused)
            table = _table(list(reader.samples(sidecar.rows)), sidecar.rows)
            fingerprint = read_fingerprint(path, size_bytes, blocks_of_stream(path, file))
            if not is_remote(path) and file.seek(0, 2) != size_bytes:
                raise OSError("its length changed while it was read")
    except OSError as error:
        return unreadable_shard(path, str(error))
    grouped.rejected += [rejection(path, why, None, None, rows) | {"stage": "json"} for why, rows in unused.items()]
    rejected = pa.Table.from_pylist(grouped.rejected, schema=REJECTED_SCHEMA)
    return ShardContent(table, rejected, size_bytes, _index_checksum(index), fingerprint, grouped.counts)


def _index(path: str, stream: BinaryIO, size_bytes: int, choice: MemberChoice) -> tuple[TarIndex, str | None]:
    """Return the index of a tar, another tool's or our own, and why another tool's is not used. A remote file keeps the texts."""
    endings = {name.rpartition(".")[2] for name in (JSON, *choice.captions) if not name.startswith(JSON_FIELD)}

    def texts(members: Iterable[Member]) -> list[tuple[int, int]]:
        found = (
            item for item in members if item.size <= MAX_KEPT_BYTES and item.name.rpartition(".")[2].lower() in endings
        )
        return [(item.offset, item.offset + item.size) for item in found]

    if isinstance(stream, FolderFile):
        return _walked(stream), None
    index, why = given_index(path, stream, size_bytes)
    if index is not None:
        if isinstance(stream, RemoteFile):
            stream.fetch(texts(index.members))
        return index, why
    members: list[Member] = []
    seen = 0

    def new_texts() -> list[tuple[int, int]]:
        nonlocal seen
        first, seen = seen, len(members)
        return texts(members[first:])

    if isinstance(stream, RemoteFile):
        stream.keep(new_texts)
    return index_tar(stream, size_bytes, members=members), why


def _walked(stream: BinaryIO) -> TarIndex:
    """Return the members of a tar, by its headers, or of a folder."""
    if not isinstance(stream, FolderFile):
        return index_tar(stream, stream.seek(0, 2))
    ends = zip(stream.names, stream.starts, stream.starts[1:], strict=False)
    return TarIndex([Member(name, start, end - start) for name, start, end in ends], None, None)


def _size_and_compression(stream: BinaryIO) -> tuple[int, str | None]:
    size_bytes = stream.seek(0, 2)
    stream.seek(0)
    return size_bytes, compression_of(stream.read(MAGIC_BYTES))


def checksum_shard(path: str) -> tuple[int, str]:
    """Return the size and the index checksum of a tar from its headers, as `read_shard` notes them; or raise an OSError."""
    with open_binary(path) as file, plain(path, file) as stream:
        return file.seek(0, 2), _index_checksum(_walked(stream))


def read_pairs(path: str, targets: Sequence[str]) -> Pairs:
    """Yield the encoded image and the targets of each sample of a tar, in order; None where the image or a target is missing.

    Samples are found as an import finds them. A remote tar is downloaded first. `targets` are the extensions of the members that come with
    each image, such as "cls". A tar that cannot be read is an OSError; a compressed or damaged one, a ValueError.
    """
    with open_whole(path) as file, plain(path, file) as stream:
        if packed := _size_and_compression(stream)[1]:
            raise ValueError(packed)
        index = _walked(stream)
        if index.damage:
            raise ValueError(index.damage)
        grouped = group_members(index, path, MemberChoice(captions=(targets[0],)))
        for item in grouped.rejected:
            yield from [(ImageError(item["reason"], item["detail"] or ""), None)] * item["rows"]
        yield from [(ImageError(HARMLESS, path), None)] * grouped.counts.harmless
        for members in grouped.groups.values():
            extension, found = image_of(members, PAIR_EXTENSIONS), [members.get(target) for target in targets]
            image, kept = members[extension] if extension else None, [item for item in found if item is not None]
            usable = len(kept) == len(found) and all(item.size <= MAX_TARGET_BYTES for item in kept)
            yield (
                image and (too_long(image.size) or read_member(stream, image)),
                tuple(read_member(stream, item) for item in kept) if usable else None,
            )


def _index_checksum(index: TarIndex) -> str:
    text = "\n".join(f"{name}\t{offset}\t{size}" for name, offset, size in index.members)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class _FaultError(Exception):
    """A sample cannot be imported, for a reason with a detail."""


@dataclass(frozen=True)
class _Reader:
    grouped: Grouped
    stream: BinaryIO
    path: str
    choice: MemberChoice
    unused: Counter[str]  # values of JSON that are not used, by reason

    def samples(self, sidecar: dict[str, Record]) -> Iterator[tuple[Any, ...]]:
        """Yield the values of FOUND_COLUMNS of each good sample, and a record of those of other columns."""
        several = Counter[str]()
        for key, members in self.grouped.groups.items():
            description, more = members.get(JSON), sidecar.get(key)
            value: Any = None
            try:
                fault = why_incomplete(members, self.choice) or _key_fault(key)
                if fault is not None:
                    raise _FaultError(*fault)
                if self.choice.fields and description is not None:
                    value = self._parsed(description)
                text, caption = self._caption(members, value)
            except _FaultError as error:
                self.grouped.reject(self.path, error.args[0], key, error.args[1], len(members))
                continue
            self.grouped.counts.imported += len(members)
            images = [name for name in self.choice.images if name in members and members[name].size]
            if len(images) > 1:
                several[", ".join(f".{name}" for name in images)] += 1
            image = members[images[0]]
            place: tuple[int | None, int | None] = (None, None)
            if description is not None and description.size <= MAX_JSON_BYTES:
                place = description.offset, description.size
                if more is None or not (
                    more.keys() >= OF_JSON and more.keys() & HASHES
                ):  # the sidecar's values go first
                    value = value if self.choice.fields else self._parsed(description)
                    found = _from_json(value, self.unused)
                    more = {**found, **more} if more else found
            elif description is not None:
                self.unused[f".json of more than {MAX_JSON_BYTES:,} bytes"] += 1
            extension = images[0].rpartition(".")[2]
            yield key, caption, extension, image.offset, image.size, text.offset, text.size, *place, more
        for names, rows in several.items():
            detail = f"{names}; `image` chooses another order"
            taken = rejection(self.path, "several images, the first kind is taken", None, detail, rows)
            self.grouped.rejected.append(taken | {"stage": "members"})

    def _parsed(self, description: Member) -> Any:  # noqa: ANN401  (a JSON value)
        """Return the value of a JSON that is not too long; None where it is, or is no JSON."""
        if description.size > MAX_JSON_BYTES:
            return None
        content = read_member(self.stream, description)
        try:
            plain = content[:1] == b"{" and content[1:2] != b"\0"  # UTF-8, which json would take long to find out
            return json.loads(content.decode("utf-8", "surrogatepass") if plain else content)
        except (ValueError, RecursionError):
            return None

    def _caption(self, members: dict[str, Member], value: Any) -> tuple[Member, str]:  # noqa: ANN401
        """Return the member that is, or holds, the caption, and its text: the first that is not empty, else the first.

        Raises:
            _FaultError: there is none, or it cannot be used.
        """
        first: tuple[Member, str] | None = None
        for name in self.choice.captions:
            field = name.startswith(JSON_FIELD)
            if (member := members.get(JSON if field else name)) is None:
                continue
            if (text := self._field(value, name) if field else self._text(member)) is None:
                continue
            first = first or (member, text)
            if text:
                return member, text
        if first is None:
            raise _FaultError("no caption in the JSON", f"no text at {' or '.join(self.choice.fields)}")
        return first

    def _field(self, value: Any, name: str) -> str | None:  # noqa: ANN401  (a JSON value)
        text = text_at(value, name.removeprefix(JSON_FIELD))
        if text is not None and not is_unicode(text):
            raise _FaultError("caption is not UTF-8", f"{name} has half a character")
        if text is not None and (size_bytes := len(text.encode())) > MAX_TEXT_BYTES:
            raise _too_long(size_bytes)
        return text

    def _text(self, member: Member) -> str:
        if member.size > MAX_TEXT_BYTES:
            raise _too_long(member.size)
        try:
            return read_member(self.stream, member).decode()
        except UnicodeDecodeError as error:
            raise _FaultError("caption is not UTF-8", str(error)) from error


def _too_long(size_bytes: int) -> _FaultError:
    return _FaultError("caption is too long", f"{size_bytes:,} bytes, more than {MAX_TEXT_BYTES:,}")


def _table(samples: list[tuple[Any, ...]], sidecar: dict[str, Record]) -> pa.Table:
    *found, records = zip(*samples, strict=True) if samples else [()] * (len(FOUND_COLUMNS) + 1)
    others = {name for row in sidecar.values() for name in row} - {*SAMPLE_SCHEMA.names} - HASHES
    hashes = HASHES & {name for record in records if record for name in record}
    schema = samples_schema([*sorted(others), *hash_columns(hashes)])
    columns: dict[str, Any] = dict(zip(FOUND_COLUMNS, found, strict=True))
    some = any(records)
    for name in set(schema.names) - set(FOUND_COLUMNS):
        columns[name] = [record.get(name) if record else None for record in records] if some else [None] * len(samples)
    return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema)


def _key_fault(key: str) -> tuple[str, str | None] | None:
    if key.isprintable():
        return None
    if not is_unicode(key):
        return "key is not UTF-8", None
    return ("key holds a line break", None) if "\n" in key or "\r" in key else None


def read_member(stream: BinaryIO, member: Member) -> bytes:
    """Return the content of a member; an OSError if the tar ends before."""
    stream.seek(member.offset)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise OSError("it was cut while it was read")
    return content


def _from_json(value: Any, unused: Counter[str]) -> Record:  # noqa: ANN401  (a JSON value)
    """Return width, height, uid and hashes, if the JSON has them; values that cannot be used are counted by reason."""
    if not isinstance(value, dict):
        unused[".json is no JSON object"] += 1
        return {}
    found: Record = {name: int(value[name]) for name in SIDES if _is_side(value.get(name))}
    for name in SIDES:
        if name not in found and value.get(name) is not None:
            unused[f"{name} in .json is no whole number of pixels"] += 1
    if uid := parse_uid(value.get("uid")):
        found["uid"] = uid
    elif value.get("uid") is not None:
        unused["uid in .json is not 32 hexadecimal digits"] += 1
    return found | noted_record(value)


def _is_side(value: object) -> bool:
    whole = type(value) is int or (type(value) is float and value.is_integer())  # bool is another type
    return whole and 0 < value < 2**31  # type: ignore[operator]
