"""Tables of samples' values: metadata, whose samples have no bytes, and img2dataset's sidecars of tars, joined by key.

DataComp's metadata `X.parquet` have uid, text, sizes and scores; LAION's, SAMPLE_ID, URL, TEXT, sizes and scores; lists for img2dataset,
url and caption. A sidecar `{shard}.parquet` has key, sizes, uid and scores.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.noted import HASH_COLUMNS, HASH_TYPE, NOTED, hex_bytes, noted_hashes
from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.shards.columns import (
    BATCH_ROWS,
    DAMAGE,
    TOO_LONG,
    UserTable,
    count_rows,
    is_text,
    numbers,
    score_columns,
    sides,
    table_at,
    texts,
    uid_texts,
    value_type,
)
from tailwise.shards.content import ShardContent, samples_without_bytes, without_samples
from tailwise.shards.grouping import Record, rejection
from tailwise.shards.tar import without_packing
from tailwise.storage.remote import is_remote, size_of

SIDES = ("width", "height")
_UID = re.compile("[0-9a-fA-F]{32}")


def parse_uid(value: object) -> bytes | None:
    """Return the 16 bytes of a uid of 32 hexadecimal digits, or None."""
    return bytes.fromhex(value) if isinstance(value, str) and _UID.fullmatch(value) else None


def parse_uids(column: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the bytes of the m uids of 32 hexadecimal digits in a column of strings [n], uint8 [m, 16]; and a mask of them, bool [n]."""
    return hex_bytes(column, 32)


class MetadataColumns(NamedTuple):
    """Names of the columns of a table of metadata."""

    id: str | None  # DataComp's uid, or LAION's SAMPLE_ID; without one, a row's number is its key
    caption: str
    url: str | None
    is_uid: bool  # whether the id is 32 hexadecimal digits


def metadata_columns(names: Sequence[str]) -> MetadataColumns | None:
    """Return which of some columns are those of a table of metadata, None if it is another table.

    `uid` and `text` are DataComp's. Otherwise there are a URL and a caption, in any case; and none of the columns that img2dataset and
    clip-retrieval write for images that they have.
    """
    if {"key", "image_path"} & {*names}:
        return None
    if {"uid", "text"} <= {*names}:
        return MetadataColumns("uid", "text", "url" if names.count("url") == 1 else None, True)
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_name[name.lower()].append(name)
    captions = by_name["caption"] or by_name["text"]
    if len(by_name["url"]) != 1 or len(captions) != 1 or by_name["status"]:
        return None
    ids = by_name["sample_id"]
    return MetadataColumns(ids[0] if len(ids) == 1 else None, captions[0], by_name["url"][0], False)


def read_metadata(path: str) -> ShardContent:
    """Return a sample for each row of a table of metadata with an id and a caption, in order; everything else by reason."""
    size_bytes = 0  # if it is gone, the next import tries again
    try:
        size_bytes = (size_of(path) or 0) if is_remote(path) else Path(path).stat().st_size
        with table_at(path) as file:
            columns = _columns_of(file)
            names = file.schema_arrow.names
            scores, unfit = score_columns(file, {columns.id, *SIDES} if columns.id else SIDES)
            counts = {name: names.count(name) for name in (_side(columns, names, side) for side in SIDES)}
            unfit |= {name: f"it has {count} columns called {name!r}" for name, count in counts.items() if count > 1}
            sizes = [name for name, count in counts.items() if count == 1]
            kept, reasons, table, checksum = _rows(file, columns, [*sizes, *scores])
            noted = noted_columns(file.schema_arrow)
            hashes = {name: _hashes(file, name, column, kept) for name, column in noted.items()}
    except DAMAGE as error:
        reason = rejection(
            path, "unreadable metadata", None, str(error), rows=0 if is_remote(path) else count_rows(path)
        )
        return without_samples([reason], size_bytes)
    pixels = {}
    for name in sizes:
        column = table.column(name)
        try:
            pixels[name] = sides(column, name)
        except ValueError as error:
            unfit[name] = str(error)
    rejected = [
        rejection(path, reason, key)
        for reason, rows in reasons.items()
        for key in table["key"].filter(pa.array(rows)).to_pylist()
    ]
    unused: list[tuple[str, str | None, int]] = [("column not used", detail, len(table)) for detail in unfit.values()]
    for name, (_, odd) in pixels.items():
        if count := int(odd[kept].sum()):
            unused.append((f"{name} is no whole number of pixels", None, count))
    rejected += [
        rejection(path, why, None, detail, rows) | {"stage": "metadata columns"} for why, detail, rows in unused
    ]
    rows = pa.array(kept)
    found: dict[str, pa.Array] = {name: table[name].filter(rows) for name in ("key", "caption")}
    if columns.is_uid:
        found["key"] = pc.utf8_lower(found["key"])
        uids = np.ascontiguousarray(parse_uids(found["key"])[0])
        found["uid"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(uids), [None, pa.py_buffer(uids)])
    for side in SIDES:
        if (name := _side(columns, names, side)) in pixels:
            found[side] = pixels[name][0].filter(rows)
    others = {name: numbers(table.column(name).filter(rows), name) for name in scores}
    samples = samples_without_bytes(found, others | {HASH_COLUMNS[name]: values for name, values in hashes.items()})
    rejections = pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA)
    return ShardContent(samples, rejections, size_bytes, checksum)


def read_urls(path: str, samples: npt.NDArray[np.int64]) -> tuple[str, pa.Array]:
    """Return the index checksum of a table of metadata, as `read_metadata` gives it; and the URLs of samples, by their numbers, ascending.

    Both have shape [n]; a URL may be null. Raises DAMAGE if the table cannot be read, or has no URLs or fewer samples.
    """
    with table_at(path) as file:
        columns = _columns_of(file)
        if columns.url is None:
            raise ValueError("it has no column 'url'")
        found = _rows(file, columns, [])
        wanted, first, urls = np.flatnonzero(found.kept)[samples], 0, [pa.array([], pa.string())]
        for values in _texts_of(file, columns.url):
            here = wanted[(wanted >= first) & (wanted < first + len(values))]
            urls.append(values.take(here - first))
            first += len(values)
    return found.checksum, pa.chunked_array(urls)


def noted_columns(schema: pa.Schema) -> dict[str, str]:
    """Return which columns of text, in any case, note something of NOTED: name → column. One of several is none of them."""
    lower = [name.lower() for name in schema.names]
    there = {name: schema.field(lower.index(name)) for name in NOTED if lower.count(name) == 1}
    return {name: column.name for name, column in there.items() if is_text(column.type)}


def hashes_of(name: str, values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return the hashes of a column of text that notes `name`: binary(16) [n], null where a text is none, too long or not UTF-8."""
    found = texts(values, name, check=False)
    good = pa.array(fitness(found) == "")
    return noted_hashes(name, pc.if_else(good, found, pa.scalar(None, found.type)))


def _hashes(file: UserTable, name: str, column: str, kept: npt.NDArray[np.bool_]) -> pa.Array:
    """Return `hashes_of` a column, of the kept rows; no text is held."""
    found, first = [pa.array([], HASH_TYPE)], 0
    for values in _texts_of(file, column):
        found.append(hashes_of(name, values.filter(pa.array(kept[first : first + len(values)]))))
        first += len(values)
    return pa.concat_arrays(found)


def _columns_of(file: UserTable) -> MetadataColumns:
    names = file.schema_arrow.names
    found = metadata_columns(names)
    needed = [name for name in (found[:3] if found else ("uid", "text")) if name]
    for name in needed:
        if (count := names.count(name)) != 1:
            raise ValueError(f"it has {count} columns called {name!r}" if count else f"it has no column {name!r}")
    if found is None:
        raise ValueError("it has columns of images")
    return found


def _side(columns: MetadataColumns, names: Sequence[str], side: str) -> str:
    """Return the column of a side: DataComp's, or that of this name in any case."""
    if columns.is_uid:
        return f"original_{side}"
    return next((name for name in names if name.lower() in {side, f"original_{side}"}), side)


class _Rows(NamedTuple):
    kept: npt.NDArray[np.bool_]  # bool [n], rows that are samples
    reasons: dict[str, npt.NDArray[np.bool_]]  # bool [n] each, rows that are rejected
    table: pa.Table  # key, caption and other columns of n rows
    checksum: str  # of the index


def _rows(file: UserTable, columns: MetadataColumns, others: Sequence[str]) -> _Rows:
    """Return the rows of a table of metadata, with other columns. The URLs are not held: those of LAION take gigabytes."""
    read = file.read([*filter(None, [columns.id]), columns.caption, *others], [columns.caption])
    captions = texts(read[columns.caption], columns.caption, check=False)
    if columns.id is None:
        ids = pa.array(np.arange(len(read))).cast(pa.string())
    else:
        ids = (uid_texts if columns.is_uid else texts)(read[columns.id], columns.id)
    good = parse_uids(ids)[1] if columns.is_uid else ids.is_valid().to_numpy(zero_copy_only=False)
    keys = pc.if_else(pa.array(good), pc.utf8_lower(ids), ids) if columns.is_uid else ids
    numbered = pc.dictionary_encode(keys.filter(pa.array(good))).indices.to_numpy(zero_copy_only=False)
    first = np.zeros(len(numbered), np.bool_)
    first[np.unique(numbered, return_index=True)[1]] = True
    kept = good.copy()
    kept[good] = first
    bad_id = "uid is not 32 hexadecimal digits" if columns.is_uid else f"no {columns.id}"
    reasons = {bad_id: ~good, "duplicate key": good & ~kept}
    checked = {"caption": fitness(captions)}
    found = hashlib.blake2b(digest_size=16)
    if columns.url and not columns.is_uid:
        fit, start = list[npt.NDArray[np.str_]](), 0
        for values in _texts_of(file, columns.url):
            pairs = zip(
                keys[start : start + len(values)].to_pylist(), values.cast(pa.binary()).to_pylist(), strict=True
            )
            found.update(repr(list(pairs)).encode())
            fit.append(fitness(values))
            start += len(values)
        checked = {"url": np.concatenate(fit) if fit else np.empty(0, np.str_), **checked}
    for what, state in checked.items():
        reasons |= {reason.format(what): kept & (state == reason) for reason in UNFIT}
        kept = kept & (state == "")
    if columns.is_uid:
        found.update(parse_uids(keys.filter(pa.array(kept)))[0].tobytes())
    table = pa.table({"key": ids, "caption": captions, **{name: read[name] for name in others}})
    return _Rows(kept, reasons, table, found.hexdigest())


UNFIT = ("no {}", "{} is too long", "{} is not UTF-8")


def _texts_of(file: UserTable, name: str) -> Iterator[pa.Array]:
    for batch in file.iter_batches(BATCH_ROWS, [name], [name]):
        yield texts(batch.column(0), name, check=False)


def fitness(values: pa.Array) -> npt.NDArray[np.str_]:
    """Return why each text cannot be used, one of UNFIT, [n]; "" if it can."""
    given = values.is_valid().to_numpy(zero_copy_only=False)
    long = pc.equal(values, TOO_LONG).fill_null(False).to_numpy(zero_copy_only=False)
    return np.select([~given, long, ~_is_utf8(values)], UNFIT, "")


def _is_utf8(captions: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which captions are UTF-8, which Parquet does not guarantee."""
    try:
        captions.validate(full=True)
        return np.ones(len(captions), np.bool_)
    except pa.ArrowInvalid:
        raw = captions.cast(pa.binary()).to_pylist()
        return np.array([value is None or value.decode(errors="ignore").encode() == value for value in raw], np.bool_)


@dataclass
class Sidecar:
    """Values of a sidecar for the samples of its tar. Rows that img2dataset failed on are not counted as rejected."""

    path: str
    rows: dict[str, Record] = field(default_factory=dict)  # width, height, uid and scores, by key of the tar
    rejected: list[Record] = field(default_factory=list)  # unused rows and values by reason; REJECTED_SCHEMA

    def reject(self, reason: str, rows: int, detail: str | None = None, key: str | None = None) -> None:
        """Note a number of rows that are not used."""
        if rows or reason == "unreadable sidecar":
            self.rejected.append(
                {"stage": "sidecar", "reason": reason, "file": self.path, "key": key, "detail": detail, "rows": rows}
            )


def sidecar_path(tar: str) -> str:
    """Return the place of the sidecar of a tar, or of a folder of files."""
    return without_packing(tar).removesuffix(".tar").rstrip("/") + ".parquet"


def read_sidecar(tar: str, keys: Collection[str]) -> Sidecar:
    """Return the sidecar of a tar at a path or URL, for the keys of the tar; an empty one if it is missing or has no keys."""
    found = Sidecar(sidecar_path(tar))
    rows = 0
    try:
        with table_at(found.path) as file:
            rows = int(file.metadata.num_rows)
            if "key" in file.schema_arrow.names:
                _join(found, file, keys)
    except FileNotFoundError:
        return found
    except DAMAGE as error:
        found.rows.clear()
        found.rejected.clear()
        found.reject("unreadable sidecar", rows, " ".join(str(error).split()))
    return found


def _join(found: Sidecar, file: UserTable, keys: Collection[str]) -> None:
    scores, unfit = score_columns(file)
    wanted = [name for name in ("key", "status", *SIDES, "uid") if name in file.schema_arrow.names]
    for name in wanted:
        if file.schema_arrow.names.count(name) > 1:
            raise ValueError(f"it has several columns called {name!r}")
    noted = noted_columns(file.schema_arrow)
    table = file.read([*wanted, *noted.values(), *scores], [*noted.values()])
    if "status" in wanted:
        table = table.filter(pa.array([status == "success" for status in texts(table["status"], "status").to_pylist()]))
    for detail in unfit.values():
        found.reject("column not used", len(table), detail)
    _match(found, table["key"], _records(found, table, scores, noted), keys)


def _match(found: Sidecar, column: pa.ChunkedArray, records: Iterator[Record], keys: Collection[str]) -> None:
    """Match rows with the keys of the tar, and count the rows and keys that are left."""
    by_key: defaultdict[str, list[Record]] = defaultdict(list)
    counts = Counter[str]()
    for key, record in zip(_tar_keys(column, keys), records, strict=True):
        if isinstance(key, str):
            by_key[key].append(record)
        else:
            counts["row without key" if key is None else "ambiguous key"] += 1
    for key, mine in by_key.items():
        if key not in keys:
            counts["row without sample"] += len(mine)
        elif any(record != mine[0] for record in mine):
            found.reject("key given twice with different values", len(mine), "none of its rows is used", key)
        else:
            found.rows[key] = mine[0]
            counts["row given twice"] += len(mine) - 1
    if any(key in keys for key in by_key):
        counts["sample without row"] = sum(key not in by_key for key in keys)
    elif by_key:
        first, sample = next(iter(by_key)), next(iter(keys), None)
        detail = f"the first key is {first!r} ({column.type}), the first sample's {sample!r}"
        found.reject("sidecar matches no sample", counts.pop("row without sample"), detail)
    for reason, rows in counts.items():
        found.reject(reason, rows)


def _tar_keys(column: pa.ChunkedArray, keys: Collection[str]) -> list[str | Literal[False] | None]:
    """Return the key of each row; None if it has none, False if a number may be several keys of the tar.

    pandas turns the key 000000123 into the number 123: of a column of numbers, it is the tar's key with this value.
    """
    kind = value_type(column.type)
    names: list[str | None] = texts(column, "key").to_pylist()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return list(names)
    by_number: dict[str, str | Literal[False]] = {}
    for key in keys:
        if key.isascii() and key.isdigit():
            number = key.lstrip("0") or "0"
            by_number[number] = False if number in by_number else key
    return [None if name is None else by_number.get(name, name) for name in names]


def _records(found: Sidecar, table: pa.Table, scores: list[str], noted: Mapping[str, str]) -> Iterator[Record]:
    """Yield the values of each row; those that cannot be used are counted."""
    columns: dict[str, list[Any]] = {}
    for name in (*SIDES, "uid"):
        if name not in table.column_names:
            continue
        try:
            if name == "uid":
                given = uid_texts(table[name]).to_pylist()
                columns[name] = list(map(parse_uid, given))
                odd = [uid is None and text is not None for uid, text in zip(columns[name], given, strict=True)]
                found.reject("uid is not 32 hexadecimal digits", sum(odd))
            else:
                pixels, other = sides(table[name], name)
                columns[name] = pixels.to_pylist()
                found.reject(f"{name} is no whole number of pixels", int(other.sum()))
        except ValueError as error:
            found.reject("column not used", len(table), str(error))
    for name, column in noted.items():
        columns[HASH_COLUMNS[name]] = hashes_of(name, table[column]).to_pylist()
    for name in scores:
        values = numbers(table[name], name).to_numpy(zero_copy_only=False)
        columns[name] = [None if np.isnan(value) else float(value) for value in values]
    for at in range(len(table)):
        yield {name: values[at] for name, values in columns.items() if values[at] is not None}
