"""DataComp's metadata `X.parquet` (uid, text, sizes, scores) as a container whose samples have no bytes."""

from __future__ import annotations

import hashlib
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
    sides,
    texts,
    uid_texts,
)
from tailwise.shards.content import ShardContent, samples_without_bytes, without_samples
from tailwise.shards.grouping import rejection

_SIDES = {"width": "original_width", "height": "original_height"}
STAGE = "metadata columns"


def parse_uids(column: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the bytes of the m uids of 32 hexadecimal digits in a column of strings [n], uint8 [m, 16]; and a mask of them, bool [n]."""
    good = pc.match_substring_regex(column, "^[0-9a-fA-F]{32}$").fill_null(False)
    joined = "".join(column.filter(good).to_pylist())
    return np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, 16), good.to_numpy(zero_copy_only=False)


def read_metadata(path: str) -> ShardContent:
    """Return a sample for each row of a local `X.parquet` with a uid and a caption, in order; everything else by reason."""
    size_bytes = Path(path).stat().st_size if Path(path).exists() else 0  # if it is gone, the next import tries again
    try:
        with open_table(path, ["uid", "text"]) as file:
            names = file.schema_arrow.names
            scores, unfit = score_columns(file)
            counts = {name: names.count(name) for name in _SIDES.values()}
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
    kept = fresh & text & ~long
    unused: list[tuple[str, str | None, int]] = [("column not used", detail, len(table)) for detail in unfit.values()]
    for name, (_, odd) in pixels.items():
        if count := int(odd[kept].sum()):
            unused.append((f"{name} is no whole number of pixels", None, count))
    rejected += [rejection(path, why, None, detail, rows) | {"stage": STAGE} for why, detail, rows in unused]
    uid_bytes = np.ascontiguousarray(parsed[kept[good]])
    rows = pa.array(kept)
    samples = samples_without_bytes(
        {
            "key": pa.array([row.hex() for row in uid_bytes.view("V16").reshape(-1).tolist()], pa.string()),
            "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(uid_bytes), [None, pa.py_buffer(uid_bytes)]),
            "caption": captions.filter(rows),
            **{side: pixels[name][0].filter(rows) for side, name in _SIDES.items() if name in pixels},
        },
        {name: numbers(table.column(name).filter(rows), name) for name in scores},
    )
    checksum = hashlib.blake2b(uid_bytes.tobytes(), digest_size=16).hexdigest()
    return ShardContent(samples, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), size_bytes, checksum)


def _is_utf8(captions: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which captions are UTF-8, which Parquet does not guarantee."""
    try:
        captions.validate(full=True)
        return np.ones(len(captions), np.bool_)
    except pa.ArrowInvalid:
        raw = captions.cast(pa.binary()).to_pylist()
        return np.array([value is None or value.decode(errors="ignore").encode() == value for value in raw], np.bool_)
