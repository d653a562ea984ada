"""Parquet files with images: each row is a sample, as in `datasets` of the Hugging Face Hub and img2dataset's parquet output.

Such a file is read by ranges, as a tar is: byte GROUP_BYTES · g + i of it is byte i of what its row group g holds, if each image is
followed by its caption. A row group is decoded whole, because its pages are compressed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.noted import HASH_COLUMNS
from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.shards.columns import (
    DAMAGE,
    MAX_TEXT_BYTES,
    UserTable,
    is_bytes,
    is_text,
    numbers,
    score_columns,
    sides,
    table_at,
    texts,
    uid_texts,
    unwrapped,
    value_type,
)
from tailwise.shards.content import Pairs, ParquetLayout, ShardContent, samples_schema, without_samples
from tailwise.shards.decode import too_long
from tailwise.shards.fingerprint import read_fingerprint, shard_blocks
from tailwise.shards.grouping import DEFAULT, rejection
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import SIDES, hashes_of, noted_columns, parse_uid
from tailwise.storage.errors import NoRangesError
from tailwise.storage.files import local_file, open_whole
from tailwise.storage.ranged_file import RangedFile
from tailwise.storage.remote import is_remote, read_range
from tailwise.text import is_unicode

GROUP_BYTES = 1 << 40
MOST_GROUP_BYTES = 4 << 30  # of the images and captions of a row group, which are in memory together
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img")  # binary, or struct with binary `bytes`
CAPTION_COLUMNS = ("caption", "text", "txt", "alt_text", "title")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
CLASS_COLUMNS = ("cls", "label", "class_index", "labels")
_MAGIC = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")),
    *((b"II*\0", "tif"), (b"MM\0*", "tif")),
)


class ImageColumns(NamedTuple):
    """Columns of a Parquet file with images."""

    image: str  # path of the binary column, such as "image.bytes"
    path: str | None  # path of the column with names of image files, where images may lie that are not in the file
    caption: str | None
    key: str | None  # None: the number of the row is the key


def image_columns(schema: pa.Schema, choice: MemberChoice = DEFAULT) -> ImageColumns | None:
    """Return the columns of a Parquet file with images, by their names and types; None for one without (chosen) images."""
    kinds = dict(zip(schema.names, map(value_type, schema.types), strict=True))
    fields = {name: {item.name: item.type for item in kind} for name, kind in kinds.items() if pa.types.is_struct(kind)}
    structs = [name for name, inner in fields.items() if is_bytes(inner.get("bytes", kinds[name]))]
    images = _chosen(IMAGE_COLUMNS, choice.images, DEFAULT.images, kinds)
    named = [name for name in images if name in structs or is_bytes(kinds[name])]
    if not (named := named or (structs[:1] if choice.images == DEFAULT.images else [])):
        return None
    captions = _chosen(CAPTION_COLUMNS, choice.captions, DEFAULT.captions, kinds)
    captions = [name for name in captions if is_text(kinds[name])]
    keys = [name for name in KEY_COLUMNS if name in kinds]
    image, path = named[0], None
    if image in structs:
        image, path = f"{image}.bytes", f"{image}.path" if "path" in fields[image] else None
    return ImageColumns(image, path, captions[0] if captions else None, keys[0] if keys else None)


def _chosen(usual: Sequence[str], chosen: Sequence[str], default: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the names of columns in order of preference: the usual ones, or those that were chosen, in upper or lower case."""
    return [name for wanted in (usual if chosen == default else chosen) for name in names if name.lower() == wanted]


def has_images(path: str, choice: MemberChoice = DEFAULT, *, unreadable: bool = False) -> bool:
    """Return whether a Parquet file has images; `unreadable` for one that cannot be read."""
    try:
        with open_images(path) as file:
            return image_columns(file.schema_arrow, choice) is not None
    except DAMAGE:
        return unreadable


class _RemoteRanges(RangedFile):
    """A remote file of known size, of which only the bytes are fetched that are read."""

    def __init__(self, url: str, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._url = url
        self._whole: BinaryIO | None = None  # of a server without ranges

    def read_at(self, start: int, stop: int) -> bytes:
        if self._whole is None:
            try:
                return read_range(self._url, start, stop, self.size_bytes).content
            except NoRangesError:
                self._whole = open_whole(self._url)
        self._whole.seek(start)
        return self._whole.read(stop - start)

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        super().close()


@contextmanager
def open_images(path: str) -> Iterator[UserTable]:
    """Open a Parquet file, local or at a URL, to be read in order; errors of Arrow become an OSError."""
    with _arrow_errors(), table_at(path) as file:
        yield file


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except DAMAGE as error:
        raise OSError(" ".join(str(error).split())) from error


class RowGroups:
    """The bytes of a file's row groups. Holds the footer alone; may be used by several threads."""

    def __init__(self, path: str, size_bytes: int, layout: ParquetLayout) -> None:
        """Read the footer; an OSError if the file cannot be read."""
        self.path, self.size_bytes, self.layout = path, size_bytes, layout
        with self._opened() as file:
            self.footer: pq.FileMetaData = file.metadata

    @contextmanager
    def _opened(self, footer: pq.FileMetaData | None = None) -> Iterator[UserTable]:
        source: Any = _RemoteRanges(self.path, self.size_bytes) if is_remote(self.path) else local_file(self.path)
        with _arrow_errors(), UserTable(source, footer) as file:
            yield file

    def stored_bytes(self, number: int) -> int:
        """Return the bytes that the file takes for images and captions of a row group."""
        group, names = self.footer.row_group(number), {self.layout["image"], self.layout["caption"]}
        chunks = map(group.column, range(group.num_columns))
        return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in names)

    def content(self, number: int) -> memoryview:
        """Return the bytes of a row group, each image followed by its caption; an OSError if their number has changed."""
        image, caption = self.layout["image"], self.layout["caption"]
        with self._opened(self.footer) as file:
            names = [name for name in (image, caption) if name is not None]
            found = joined_bytes(*_images_and_captions(file.read_group(number, names), image, caption))
        if len(found) != self.layout["groups"][number]:
            raise OSError(f"{self.path} has other content than when it was imported")
        return found


def joined_bytes(images: pa.LargeBinaryArray, captions: pa.LargeBinaryArray) -> memoryview:
    """Return the bytes of all rows: each image followed by its caption, nothing for a null."""
    nothing = pa.scalar(b"", pa.large_binary())
    joined = pc.binary_join_element_wise(images, captions, nothing, null_handling="replace", null_replacement=b"")
    ends = np.frombuffer(joined.buffers()[1], np.int64)[joined.offset : joined.offset + len(joined) + 1]
    return memoryview(joined.buffers()[2] or b"")[ends[0] : ends[-1]] if len(joined) else memoryview(b"")


def _images_and_captions(
    table: pa.Table, image: str, caption: str | None
) -> tuple[pa.LargeBinaryArray, pa.LargeBinaryArray]:
    images = _binary(table, image)
    return images, pa.nulls(len(images), pa.large_binary()) if caption is None else _binary(table, caption)


def _binary(table: pa.Table, path: str) -> pa.LargeBinaryArray:
    """Return a column, or a field of one, as bytes in a plain layout."""
    name, _, inner = path.partition(".")
    chunks = [pc.struct_field(chunk, inner) if inner else chunk for chunk in table.column(name).chunks]
    plain = [unwrapped(chunk).cast(pa.large_binary()) for chunk in chunks]
    return pa.concat_arrays(plain) if plain else pa.array([], pa.large_binary())


def checksum_images(path: str) -> tuple[int, str]:
    """Return the size of a file and the checksum of its footer: the places, sizes and numbers of values of all column chunks."""
    with shard_blocks(path) as (size_bytes, _), open_images(path) as file:
        return size_bytes or 0, _checksum(file.metadata)


def _checksum(footer: pq.FileMetaData) -> str:
    about: list[tuple[Any, ...]] = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        about.append((group.num_rows,))
        for leaf in range(group.num_columns):
            chunk = group.column(leaf)
            sizes = chunk.num_values, chunk.total_compressed_size, chunk.total_uncompressed_size
            about.append((chunk.path_in_schema, chunk.data_page_offset, *sizes))
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()


def read_images(path: str, choice: MemberChoice = DEFAULT) -> ShardContent:
    """Return a sample for each row with an image and a caption, in order; everything else by reason.

    Rows that img2dataset failed on are passed over. One row group is in memory at a time, decoded.
    """
    size_bytes = 0
    try:
        with shard_blocks(path) as (found, read), open_images(path) as file:
            size_bytes = found or 0
            columns = image_columns(file.schema_arrow, choice)
            if columns is None:
                raise ValueError("it has no column of images")
            reader = _Reader(path, file, columns)
            tables = [reader.samples(number) for number in range(file.num_row_groups)]
            table = pa.concat_tables([samples_schema(reader.others).empty_table(), *tables])
            checksum, fingerprint = _checksum(file.metadata), read_fingerprint(path, size_bytes, read)
    except DAMAGE as error:
        return without_samples([rejection(path, "unreadable Parquet file", None, str(error), rows=0)], size_bytes)
    rejected = pa.Table.from_pylist(reader.rejected, schema=REJECTED_SCHEMA)
    layout = ParquetLayout(image=columns.image, caption=columns.caption, groups=reader.groups)
    return ShardContent(table, rejected, size_bytes, checksum, fingerprint, parquet=layout)


class _Reader:
    """The samples of a file, row group by row group."""

    def __init__(self, path: str, file: UserTable, columns: ImageColumns) -> None:
        self.path, self.file, self.columns = path, file, columns
        self.scores, unfit = score_columns(file)
        self.rejected = [
            rejection(path, "column not used", None, why, file.metadata.num_rows) | {"stage": "columns"}
            for why in unfit.values()
        ]
        self.groups: list[int] = []  # bytes of images and captions of each row group
        self._names = set(file.schema_arrow.names)
        self._noted = noted_columns(file.schema_arrow)
        self.others = [*self.scores, *map(HASH_COLUMNS.__getitem__, self._noted)]
        self._keys, self._rows = set[str](), 0

    @cached_property
    def _read(self) -> list[str]:
        wanted = [*self.columns, "status", "uid", *SIDES, *self._noted.values(), *self.scores]
        return list(dict.fromkeys(name for name in wanted if name and name.split(".")[0] in self._names))

    def samples(self, number: int) -> pa.Table:
        table = self.file.read_group(number, self._read, MOST_GROUP_BYTES)
        images, captions = _images_and_captions(table, self.columns.image, self.columns.caption)
        sizes = [pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False) for values in (images, captions)]
        ends = np.cumsum(sizes[0] + sizes[1])
        self.groups.append(int(ends[-1]) if len(ends) else 0)
        starts = ends - sizes[0] - sizes[1] + number * GROUP_BYTES
        heads = pc.binary_slice(images, 0, 12).to_pylist()
        keys = self._key_column(table)
        kept = self._kept(table, keys, heads, captions)
        places = {"image_offset": starts, "image_bytes": sizes[0]}
        places |= {"caption_offset": starts + sizes[0], "caption_bytes": sizes[1]}
        columns: dict[str, Any] = {name: pa.array(values[kept], pa.int64()) for name, values in places.items()}
        rows = pa.array(kept)
        columns |= {
            "key": pa.array([keys[at] or "" for at in np.flatnonzero(kept).tolist()], pa.string()),
            "caption": captions.filter(rows).cast(pa.string()),
            "image_extension": pa.array([_extension(heads[at]) for at in np.flatnonzero(kept).tolist()], pa.string()),
            **{name: numbers(table.column(name).filter(rows), name) for name in self.scores},
        }
        for side in SIDES:
            if side in self._names:
                columns[side] = sides(table.column(side), side)[0].filter(rows)
        if "uid" in self._names:
            columns["uid"] = pa.array(
                map(parse_uid, uid_texts(table.column("uid")).filter(rows).to_pylist()), pa.binary(16)
            )
        for name, column in self._noted.items():
            columns[HASH_COLUMNS[name]] = hashes_of(name, table.column(column).filter(rows))
        schema = samples_schema(self.others)
        given = [columns.get(item.name, pa.nulls(int(kept.sum()), item.type)) for item in schema]
        return pa.table(given, schema)

    def _key_column(self, table: pa.Table) -> list[str | None]:
        first, self._rows = self._rows, self._rows + len(table)
        if self.columns.key is None:
            return [f"{row:09d}" for row in range(first, self._rows)]
        found: list[str | None] = texts(table.column(self.columns.key), self.columns.key, check=False).to_pylist()
        return found

    def _kept(
        self, table: pa.Table, keys: list[str | None], heads: list[bytes | None], captions: pa.LargeBinaryArray
    ) -> npt.NDArray[np.bool_]:
        """Return which rows are samples, bool [n]; note why others are not."""
        failed = np.zeros(len(table), np.bool_)
        if "status" in self._names:
            failed = np.array([status != "success" for status in texts(table.column("status"), "status").to_pylist()])
        lengths = pc.binary_length(captions).to_pylist()
        paths = _binary(table, self.columns.path) if self.columns.path else pa.nulls(len(table), pa.binary())
        kept = ~failed
        for row in np.flatnonzero(kept).tolist():
            key, length = keys[row], lengths[row]
            reason, detail = self._key_fault(key)
            if not reason and not heads[row]:
                reason, elsewhere = "no image", paths[row].as_py()
                detail = f"its file holds only the image's path, {elsewhere!r}" if elsewhere else None
            elif not reason and length is None:
                reason = "no caption"
                detail = None if self.columns.caption else f"no column of text is called {' or '.join(CAPTION_COLUMNS)}"
            elif not reason and length > MAX_TEXT_BYTES:
                reason, detail = "caption is too long", f"{length:,} bytes, more than {MAX_TEXT_BYTES:,}"
            elif not reason and not _is_utf8(captions[row].as_py()):
                reason = "caption is not UTF-8"
            if reason:
                kept[row] = False
                self.rejected.append(rejection(self.path, reason, key, detail))
        return kept

    def _key_fault(self, key: str | None) -> tuple[str, str | None]:
        if not key:
            return "row without key", None
        if not key.isprintable() and (not is_unicode(key) or "\n" in key or "\r" in key):
            return "key holds a line break", None
        if key in self._keys:
            return "duplicate key", "only the row of this key that comes first is kept"
        self._keys.add(key)
        return "", None


def _is_utf8(text: bytes) -> bool:
    return text.isascii() or is_unicode(text.decode(errors="surrogateescape"))


def _extension(head: bytes | None) -> str:
    """Return the usual extension of an image, by its first 12 bytes; "jpg" for one that is not known."""
    start = head or b""
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "webp"
    if start[4:12] in {b"ftypavif", b"ftypavis"}:
        return "avif"
    return next((extension for magic, extension in _MAGIC if start.startswith(magic)), "jpg")


def read_image_pairs(path: str, targets: Sequence[str]) -> Pairs:
    """Yield the image and the targets of each row: of "cls", a column of CLASS_COLUMNS; of "txt", the captions, one a line."""
    with open_images(path) as file:
        columns = image_columns(file.schema_arrow)
        names = [_target_column(file, target) for target in targets]
        if columns is None or None in names:
            wanted = " or ".join(CLASS_COLUMNS if "cls" in targets else CAPTION_COLUMNS)
            raise ValueError(f"it has no column of images, or none called {wanted}")
        for number in range(file.num_row_groups):
            table = file.read_group(number, [columns.image, *(name for name in names if name)], MOST_GROUP_BYTES)
            images = _binary(table, columns.image)
            found = [[_as_target(value) for value in table.column(name).to_pylist()] for name in names if name]
            for row in range(len(table)):
                mine = [values[row] for values in found]
                image = images[row].as_py()
                targets_of_row = tuple(value for value in mine if value is not None)
                yield (
                    image and (too_long(len(image)) or image),
                    targets_of_row if len(targets_of_row) == len(mine) else None,
                )


def _target_column(file: UserTable, target: str) -> str | None:
    names = file.schema_arrow.names
    wanted = {"cls": CLASS_COLUMNS, "txt": CAPTION_COLUMNS}.get(target, ())
    return next((name for name in (target, *wanted) if name in names), None)


def _as_target(value: object) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value
    return "\n".join(map(str, value if isinstance(value, list) else [value])).encode()


def class_names(path: str) -> tuple[str, ...] | None:
    """Return the names of classes that `datasets` notes in a file, by class index; None for a file without."""
    with open_images(path) as file:
        noted = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(noted)["info"]["features"]
        found = next(features[name] for name in CLASS_COLUMNS if features.get(name, {}).get("_type") == "ClassLabel")
        return tuple(map(str, found["names"]))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
