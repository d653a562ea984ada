"""Tables of samples' values: DataComp's metadata, whose samples have no bytes, and img2dataset's sidecars of tars, joined by key.

DataComp's `X.parquet` has uid, text, sizes and scores; a sidecar `{shard}.parquet`, key, sizes, uid and scores.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.shards.columns import (
    DAMAGE,
    TOO_LONG,
    UserTable,
    count_rows,
    numbers,
    open_table,
    score_columns,
    sides,
    texts,
    uid_texts,
    value_type,
)
from tailwise.shards.content import ShardContent, samples_without_bytes, without_samples
from tailwise.shards.grouping import Record, rejection
from tailwise.storage.files import open_binary

SIDES = ("width", "height")
_UID = re.compile("[0-9a-fA-F]{32}")


def parse_uid(value: object) -> bytes | None:
    """Return the 16 bytes of a uid of 32 hexadecimal digits, or None."""
    return bytes.fromhex(value) if isinstance(value, str) and _UID.fullmatch(value) else None


def parse_uids(column: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the bytes of the m uids of 32 hexadecimal digits in a column of strings [n], uint8 [m, 16]; and a mask of them, bool [n]."""
    good = pc.match_substring_regex(column, f"^{_UID.pattern}$").fill_null(False)
    joined = "".join(column.filter(good).to_pylist())
    return np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, 16), good.to_numpy(zero_copy_only=False)


def read_metadata(path: str) -> ShardContent:
    """Return a sample for each row of a local `X.parquet` with a uid and a caption, in order; everything else by reason."""
    size_bytes = Path(path).stat().st_size if Path(path).exists() else 0  # if it is gone, the next import tries again
    try:
        with open_table(path, ["uid", "text"]) as file:
            names = file.schema_arrow.names
            scores, unfit = score_columns(file)
            counts = {name: names.count(name) for name in map("original_{}".format, SIDES)}
            unfit |= {name: f"it has {count} columns called {name!r}" for name, count in counts.items() if count > 1}
            sizes = [name for name, count in counts.items() if count == 1]
            table = file.read(["uid", "text", *sizes, *scores], ["text"])
        uids, captions = uid_texts(table.column("uid")), texts(table.column("text"), "text", check=False)
    except DAMAGE as error:
        reason = rejection(path, "unreadable metadata", None, str(error), rows=count_rows(path))
        return without_samples([reason], size_bytes)
    pixels = {}
    for name in sizes:
        column = table.column(name)
        try:
            pixels[name] = sides(column, name)
        except ValueError as error:
            unfit[name] = str(error)
    kept, uid_bytes, reasons = _usable(uids, captions)
    rejected = [
        rejection(path, reason, uid)
        for reason, rows in reasons.items()
        for uid in uids.filter(pa.array(rows)).to_pylist()
    ]
    unused: list[tuple[str, str | None, int]] = [("column not used", detail, len(table)) for detail in unfit.values()]
    for name, (_, odd) in pixels.items():
        if count := int(odd[kept].sum()):
            unused.append((f"{name} is no whole number of pixels", None, count))
    rejected += [
        rejection(path, why, None, detail, rows) | {"stage": "metadata columns"} for why, detail, rows in unused
    ]
    rows = pa.array(kept)
    samples = samples_without_bytes(
        {
            "key": pc.utf8_lower(uids.filter(rows)).cast(pa.string()),
            "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(uid_bytes), [None, pa.py_buffer(uid_bytes)]),
            "caption": captions.filter(rows),
            **{side: pixels[name][0].filter(rows) for side in SIDES if (name := f"original_{side}") in pixels},
        },
        {name: numbers(table.column(name).filter(rows), name) for name in scores},
    )
    checksum = hashlib.blake2b(uid_bytes.tobytes(), digest_size=16).hexdigest()
    return ShardContent(samples, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), size_bytes, checksum)


def _usable(
    uids: pa.Array, captions: pa.Array
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8], dict[str, npt.NDArray[np.bool_]]]:
    """Return which rows have a uid and a caption, bool [n]; their uids, uint8 [m, 16]; and which others are rejected, by reason."""
    parsed, good = parse_uids(uids)
    first = np.zeros(len(parsed), np.bool_)
    first[np.unique(parsed.view("V16").reshape(-1), return_index=True)[1]] = True
    fresh = good.copy()
    fresh[good] = first
    given = captions.is_valid().to_numpy(zero_copy_only=False)
    long = given & pc.equal(captions, TOO_LONG).fill_null(False).to_numpy(zero_copy_only=False)
    text = given & _is_utf8(captions)
    reasons = {
        "uid is not 32 hexadecimal digits": ~good,
        "duplicate key": good & ~fresh,
        "no caption": fresh & ~given,
        "caption is too long": fresh & long,
        "caption is not UTF-8": fresh & given & ~text,
    }
    kept = fresh & text & ~long
    return kept, np.ascontiguousarray(parsed[kept[good]]), reasons


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


def read_sidecar(tar: str, keys: Collection[str]) -> Sidecar:
    """Return the sidecar of a tar at a path or URL, for the keys of the tar; an empty one if it is missing or has no keys."""
    found = Sidecar(tar.removesuffix(".tar") + ".parquet")
    rows = 0
    try:
        with open_binary(found.path) as stream, open_table(stream) as file:
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
    table = file.read([*wanted, *scores])
    if "status" in wanted:
        table = table.filter(pa.array([status == "success" for status in texts(table["status"], "status").to_pylist()]))
    for detail in unfit.values():
        found.reject("column not used", len(table), detail)
    _match(found, table["key"], _records(found, table, scores), keys)


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


def _records(found: Sidecar, table: pa.Table, scores: list[str]) -> Iterator[Record]:
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
    for name in scores:
        values = numbers(table[name], name).to_numpy(zero_copy_only=False)
        columns[name] = [None if np.isnan(value) else float(value) for value in values]
    for at in range(len(table)):
        yield {name: values[at] for name, values in columns.items() if values[at] is not None}
