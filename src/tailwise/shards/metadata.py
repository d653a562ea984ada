"""DataComp's metadata `X.parquet` (uid, text, sizes, scores) as a container whose samples have no bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.schema import REJECTED_SCHEMA
from tailwise.shards.columns import (
    DAMAGE,
    TOO_LONG,
    count_rows,
    numbers,
    open_table,
    score_columns,
    texts,
    uid_texts,
    whole_sides,
)
from tailwise.shards.content import ShardContent, samples_without_bytes, without_samples
from tailwise.shards.grouping import rejection

_SIZES = {"original_width": "width", "original_height": "height"}
STAGE = "metadata columns"
_UID = "^[0-9a-fA-F]{32}$"


def parse_uids(column: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the bytes of uids of 32 hexadecimal digits in a column of strings [n].

    Returns:
        uint8 [m, 16] of the m valid uids, and a mask of them, bool [n].
    """
    good = pc.match_substring_regex(column, _UID).fill_null(False)
    joined = pc.binary_join(pa.array([column.filter(good).to_pylist()], pa.list_(pa.string())), "")[0].as_py()
    parsed = np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, 16)
    return parsed, good.to_numpy(zero_copy_only=False)


def read_metadata(path: str) -> ShardContent:
    """Return a sample for each row of a local `X.parquet` with a uid and a caption, in order; everything else by reason."""
    try:
        with open_table(path, ["uid", "text"]) as file:
            scores, unfit = score_columns(file)
            counts = {name: file.schema_arrow.names.count(name) for name in _SIZES}
            unfit |= {name: f"it has {count} columns called {name!r}" for name, count in counts.items() if count > 1}
            sizes = [name for name, count in counts.items() if count == 1]
            table = file.read(["uid", "text", *sizes, *scores], ["text"])
        uids, captions = uid_texts(table.column("uid")), texts(table.column("text"), "text", check=False)
    except DAMAGE as error:
        reason = rejection(path, "unreadable metadata", None, str(error), rows=count_rows(path))
        return without_samples([reason], _size_bytes(path))
    for name in sizes:
        try:
            values = numbers(table.column(name), name)
        except ValueError as error:
            unfit[name], values = str(error), pa.nulls(len(table), pa.float64())
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return _content(path, table, uids, captions, scores, unfit)


def _content(
    path: str, table: pa.Table, uids: pa.Array, captions: pa.Array, scores: list[str], unfit: Mapping[str, str]
) -> ShardContent:
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
    rejected = [
        rejection(path, reason, uid)
        for reason, rows in reasons.items()
        for uid in uids.filter(pa.array(rows)).to_pylist()
    ]
    unused: list[tuple[str, str | None, int]] = [("column not used", detail, len(table)) for detail in unfit.values()]
    kept = fresh & text & ~long
    for name in _SIZES.keys() & set(table.column_names):
        values = table.column(name).to_numpy()[kept]
        if odd := int((~whole_sides(values) & ~np.isnan(values)).sum()):
            unused.append((f"{name} is no whole number of pixels", None, odd))
    rejected += [rejection(path, why, None, detail, rows) | {"stage": STAGE} for why, detail, rows in unused]
    uid_bytes = np.ascontiguousarray(parsed[kept[good]])
    samples = _samples(table.filter(pa.array(kept)), uid_bytes, captions.filter(pa.array(kept)), scores)
    checksum = hashlib.blake2b(uid_bytes.tobytes(), digest_size=16).hexdigest()
    listed = pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA)
    return ShardContent(samples, listed, _size_bytes(path), checksum)


def _size_bytes(path: str) -> int:
    """Return the size of a file; 0 if it is gone, so that the next import tries again."""
    return Path(path).stat().st_size if Path(path).exists() else 0


def _samples(table: pa.Table, uids: npt.NDArray[np.uint8], captions: pa.Array, scores: list[str]) -> pa.Table:
    """Return samples without bytes, in SAMPLE_SCHEMA, with scores."""
    n = len(uids)
    columns = {
        "key": pa.array([row.hex() for row in uids.view("V16").reshape(-1).tolist()], pa.string()),
        "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n, [None, pa.py_buffer(uids.tobytes())]),
        "caption": captions,
        **{side: _sides(table, name, n) for name, side in _SIZES.items()},
    }
    return samples_without_bytes(columns, {name: numbers(table.column(name), name) for name in scores})


def _sides(table: pa.Table, name: str, rows: int) -> pa.Array:
    """Return a column of pixels; null where a row has none."""
    if name not in table.column_names:
        return pa.nulls(rows, pa.int32())
    values = table.column(name).to_numpy()
    known = whole_sides(values)
    return pa.array(np.where(known, values, 0).astype(np.int32), mask=~known)


def _is_utf8(captions: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which captions are UTF-8, which Parquet does not guarantee."""
    try:
        captions.validate(full=True)
        return np.ones(len(captions), np.bool_)
    except pa.ArrowInvalid:
        return np.array([_decodes(value) for value in captions.cast(pa.binary()).to_pylist()], np.bool_)


def _decodes(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True
