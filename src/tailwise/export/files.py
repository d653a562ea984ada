"""Exports to one file: a table of an epoch's samples, URLs for img2dataset, DynamiCS's JSON of rates, keys, and DataComp's subset file.

DataComp's resharder reads the uid in each sample's .json and writes every sample whose uid is in the file. So each uid of the file must be
in the tars, and must belong to one sample only. Uids are regrouped by their leading bits, so that memory does not grow with the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from json.encoder import encode_basestring_ascii
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog.catalog import Part
from tailwise.catalog.outputs import scratch_beside
from tailwise.context import Context
from tailwise.errors import DamagedError, UnsupportedError, UserError
from tailwise.execution.base import KERNEL, Apply
from tailwise.execution.keys import BUCKET_ROWS, KeyIndex, bits_of_buckets, buckets_of
from tailwise.execution.shuffle import Records, Shuffle
from tailwise.export.drawn import DrawnEpoch, DrawnPart, map_drawn, map_epoch
from tailwise.loader.captions import CaptionMix
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest, caption_weights
from tailwise.shards.columns import DAMAGE
from tailwise.shards.containers import with_bytes
from tailwise.shards.content import hashed_uid
from tailwise.shards.metadata import read_urls
from tailwise.sources.datacomp import UID
from tailwise.storage.delimited import line_of

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),  # path or URL of the tar
        pa.field("shard_id", pa.int32(), nullable=False),  # does not change when the tar is moved
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits
        pa.field("cluster", pa.int32()),  # null in a plan by rate
        pa.field("rate", pa.float64(), nullable=False),  # expected copies per epoch
        pa.field("copies", pa.uint8(), nullable=False),  # in this epoch, ≥ 1
    ]
)
URL_SCHEMA = pa.schema(
    [
        pa.field("url", pa.string()),  # null where the metadata have none
        pa.field("caption", pa.string(), nullable=False),
        pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits; img2dataset can write it to the .json
    ]
)
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8"), ("copies", "u1")])
_REMEDY = "export `to` shards (new tars, with uids in their .json), or `to` parquet or keys"


def write_parquet(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write one row per drawn sample, in catalog order (SCHEMA); return the number of copies."""
    total = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in map_drawn(plan, epoch, _drawn_table, context):
            writer.write_table(table)
            total += pc.sum(table.column("copies"), min_count=0).as_py()
    return total


def _drawn_table(epoch: DrawnEpoch, part: Part) -> pa.Table:
    plan, drawn = epoch.plan, epoch.part(part, ["shard", "key", "uid"])
    shards = drawn.samples.column("shard")
    groups = plan.groups[drawn.rows] if plan.has_clusters else None
    clusters = pa.nulls(len(drawn.rows), pa.int32()) if groups is None else pa.array(groups, pa.int32())
    return pa.table(
        {
            "shard": plan.catalog.shards(plan.snapshot).column("path").take(shards),
            "shard_id": shards,
            "key": drawn.samples.column("key"),
            "uid": pa.array([uid.hex() for uid in drawn.samples.column("uid").to_pylist()], pa.string()),
            "cluster": clusters,
            "rate": pa.array(plan.rate(drawn.rows, epoch.number), pa.float64()),
            "copies": pa.array(drawn.copies, pa.uint8()),
        },
        schema=SCHEMA,
    )


def write_rates_json(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write `{key: rate}` of every sample of the snapshot, with 0 for never-drawn and removed ones; return their number.

    The DynamiCS authors' trainer gives missing keys a rate of 0.5, so the file has all keys. Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path, context)
    with path.open("wb") as stream:
        stream.write(b"{")
        separator = b"\n"
        for lines in map_epoch(plan, epoch, _rate_lines, plan.catalog.parts(plan.snapshot), context):
            stream.write(separator + lines)
            separator = b",\n"
        stream.write(b"\n}\n")
    return plan.rows


def _rate_lines(epoch: DrawnEpoch, part: Part) -> bytes:
    rows, own = _keys(epoch.plan, part)
    rates, at = np.unique(epoch.rates(part.span)[rows - part.first_row], return_inverse=True)  # as many as clusters
    endings = [f": {rate!r}" for rate in rates.tolist()]
    keys = map(encode_basestring_ascii, own)
    return ",\n".join([key + endings[number] for key, number in zip(keys, at.tolist(), strict=True)]).encode()


def rates_above_one(plan: Plan, epoch: int, context: Context) -> dict[str, float]:
    """Return the number of samples with a rate above 1, and the share of the budget that the authors' trainer therefore loses.

    That trainer draws a sample at most once: of a rate of 2.5 it draws 1.
    """
    above, total, once = 0, 0.0, 0.0
    for sums in map_epoch(plan, epoch, _rate_sums, [*plan.spans()], context):
        above, total, once = above + sums[0], total + sums[1], once + sums[2]
    return {"rates_above_one": above, "short_share": 1 - once / total if above else 0.0}


def _rate_sums(epoch: DrawnEpoch, rows: slice) -> tuple[int, float, float]:
    rates = epoch.rates(rows)
    return int((rates > 1).sum()), float(rates.sum()), float(np.minimum(rates, 1.0).sum())


def write_keys(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write the key of every drawn sample, one line per copy (see `delimited`), in catalog order; return the number of lines.

    Raise a UserError if two samples share a key.
    """
    _check_unique_keys(plan, path, context)
    total = 0
    with path.open("wb") as stream:
        for lines, count in map_drawn(plan, epoch, _key_lines, context):
            stream.write(lines)
            total += count
    return total


def _key_lines(epoch: DrawnEpoch, part: Part) -> tuple[bytes, int]:
    drawn = epoch.part(part, ["key"])
    keys = np.repeat(np.array(drawn.samples.column(0).to_pylist(), dtype=object), drawn.copies)
    return "".join([f"{line_of(key)}\n" for key in keys]).encode(), len(keys)


def _keys(plan: Plan, part: Part) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the rows of a part, int64 [n], and their keys, without those of a file that is in the snapshot in a later state."""
    rows = np.arange(part.first_row, part.first_row + part.rows)
    rows = np.setdiff1d(rows, plan.catalog.replaced_rows(plan.snapshot), assume_unique=True)
    keys = plan.catalog.samples(part, ["key"]).column(0).take(pa.array(rows - part.first_row))
    return rows, list(keys.to_pylist())


def _index_keys(plan: Plan, index: KeyIndex, part: Part) -> None:
    rows, keys = _keys(plan, part)
    index.add(keys, rows)


def _check_unique_keys(plan: Plan, path: Path, context: Context) -> None:
    with scratch_beside(path) as folder:
        index = KeyIndex(folder / "keys", plan.rows)
        add = Apply(partial(_index_keys, plan, index))
        for _ in context.executor.map(add, plan.catalog.parts(plan.snapshot), KERNEL):
            pass
        clashing = index.seal(context.executor, count_only=True)
    if clashing:
        problem = (
            "share their key with a sample of another shard, and readers of this format distinguish samples by key only"
        )
        raise UserError(
            f"{clashing:,} samples {problem}: export `to` parquet (shard, key and uid) or shards (new keys)"
        )


def write_urls(plan: Plan, epoch: int, path: Path, context: Context, request: ExportRequest) -> int:
    """Write one row per sample that the plan may draw, in any epoch, in catalog order (URL_SCHEMA); return the number of rows.

    The epoch matters for `request.captions` alone.

    Raises:
        UnsupportedError: a shard has images.
        DamagedError: the metadata have changed since they were imported.
    """
    if (images := with_bytes(plan.catalog.shards(plan.snapshot))).num_rows:
        raise UnsupportedError(f"{images['path'][0]} holds images already: `to` urls is for pools of metadata")
    captions = caption_weights(request.captions)
    total, mix = 0, CaptionMix(plan.catalog, captions, plan.config["seed"]) if captions else None
    with pq.ParquetWriter(path, URL_SCHEMA, compression="zstd") as writer:
        for table in map_epoch(plan, epoch, partial(_urls, mix=mix), plan.catalog.parts(plan.snapshot), context):
            writer.write_table(table)
            total += table.num_rows
    return total


def _urls(epoch: DrawnEpoch, part: Part, *, mix: CaptionMix | None) -> pa.Table:
    plan, known = epoch.plan, epoch.plan.catalog.shards(epoch.plan.snapshot)
    places = np.flatnonzero((plan.rate(part.span) > 0) & epoch.removals.keeps(part.span))
    samples = plan.catalog.samples_at(part.number, places, ["shard", "caption", "uid"])
    shards, rows = samples["shard"].to_numpy(), places + part.first_row
    urls = [pa.array([], pa.string())]
    for shard in np.unique(shards).tolist():  # ascending, as rows are
        path = known["path"][shard].as_py()
        try:
            checksum, there = read_urls(path, rows[shards == shard] - plan.rows_of(shard).start)
        except DAMAGE as error:
            raise DamagedError(f"{path} can't be read ({error}): restore it") from error
        if checksum != known["index_checksum"][shard].as_py():
            raise DamagedError(f"{path} has changed since it was imported: put the old file back")
        urls += there.chunks
    uids = pa.array([uid.hex() for uid in samples["uid"].to_pylist()], pa.string())
    captions = samples["caption"].combine_chunks()
    if mix is not None:
        chosen = mix.of(rows, np.full(len(rows), epoch.number, np.int32))
        captions = pc.coalesce(pa.array(chosen.texts, pa.string()), captions)
    return pa.table([pa.chunked_array(urls), captions, uids], schema=URL_SCHEMA)


def write_datacomp(plan: Plan, epoch: int, path: Path, context: Context) -> int:
    """Write a sorted 1-D array of dtype "u8,u8", with one entry per copy; return the number of copies.

    Raise a UserError if a drawn sample has no uid of the source, or shares its uid with another sample, drawn or not: the resharder would
    write both.
    """
    bits = bits_of_buckets(plan.rows, BUCKET_ROWS)
    with scratch_beside(path) as folder:
        shuffle = Shuffle(folder / "uids", _RECORD, 1 << bits)
        copies = sum(map_drawn(plan, epoch, partial(_spill, shuffle=shuffle, bits=bits), context))
        shared = list[Records]()
        with path.open("wb") as stream:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, UID))
            np.lib.format.write_array_header_1_0(stream, {**header, "shape": (copies,)})
            for entries in _sorted_buckets(shuffle, plan):
                stream.write(np.repeat(entries[["high", "low"]].astype(UID), entries["copies"]).tobytes())
                shared += _shared(entries)
    if shared:
        _refuse_shared(plan, shared)
    return copies


def check_uids(plan: Plan, context: Context) -> None:
    """Raise a UserError if a sample of epoch 0 has no uid of the source."""
    for _ in map_drawn(plan, 0, _given_uids, context):
        pass


def _given_uids(epoch: DrawnEpoch, part: Part) -> DrawnPart:
    """Return the drawn samples of a part; refuse those whose uid is tailwise's hash, or whose tar has no .json for it."""
    shards = epoch.plan.catalog.shards(epoch.plan.snapshot)
    paths, first_states = shards.column("path"), epoch.plan.catalog.first_states()
    with_files = {*with_bytes(shards.filter(pc.equal(shards["part"], part.number)))["shard"].to_pylist()}
    drawn = epoch.part(part, ["uid", "shard", "key", "json_bytes"])
    columns = (drawn.samples.column(name).to_pylist() for name in ("uid", "shard", "key", "json_bytes"))
    for uid, shard, key, json_bytes in zip(*columns, strict=True):
        if uid == hashed_uid(int(first_states[shard]), key) or (json_bytes is None and shard in with_files):
            raise UserError(
                f"DataComp's resharder finds samples by the uid in their .json, and sample {key!r} of {paths[shard]} has none: {_REMEDY}"
            )
    return drawn


def _spill(epoch: DrawnEpoch, part: Part, *, shuffle: Shuffle, bits: int) -> int:
    """Write the uids of all samples of a part, with the copies of each, by their leading bits; return the number of copies."""
    drawn, catalog = _given_uids(epoch, part), epoch.plan.catalog
    uids = catalog.samples(part, ["uid"]).column(0).to_pylist()
    records = np.zeros(part.rows, _RECORD)
    records["high"], records["low"] = np.frombuffer(b"".join(uids), ">u8").reshape(-1, 2).T
    records["row"] = np.arange(part.first_row, part.first_row + part.rows)
    records["copies"][drawn.rows - part.first_row] = drawn.copies
    records = records[~np.isin(records["row"], catalog.replaced_rows(epoch.plan.snapshot))]  # each has a successor
    shuffle.write(part.name, [(buckets_of(records, bits), records)])
    return int(drawn.copies.sum())


def _sorted_buckets(shuffle: Shuffle, plan: Plan) -> Iterator[Records]:
    """Yield the records of all samples, ascending by uid, those of a uid by row."""
    names = [part.name for part in plan.catalog.parts(plan.snapshot)]
    for bucket in range(shuffle.buckets):
        entries = shuffle.read(names, bucket)
        yield entries[np.lexsort((entries["low"], entries["high"]))]


def _shared(entries: Records) -> list[Records]:
    """Return the records of each uid that several samples have, and one of them is drawn."""
    same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    first = np.flatnonzero(np.r_[True, ~same]) if len(entries) else np.empty(0, np.int64)
    sizes = np.diff(np.r_[first, len(entries)])
    groups = [entries[start : start + size] for start, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True)]
    return [group for group in groups if group["copies"].any()]


def _refuse_shared(plan: Plan, shared: list[Records]) -> None:
    paths, names = plan.catalog.shards(plan.snapshot).column("path"), list[str]()
    for row in shared[0]["row"][:2].tolist():
        part = next(part for part in plan.catalog.parts(plan.snapshot) if row < part.first_row + part.rows)
        rows: npt.NDArray[np.int64] = np.array([row - part.first_row])
        sample = plan.catalog.samples_at(part.number, rows, ["shard", "key"]).to_pylist()[0]
        names.append(f"{sample['key']!r} of {paths[sample['shard']]}")
    high, low = shared[0][["high", "low"]][0].tolist()
    raise UserError(
        f"{len(shared):,} uids of the epoch belong to several samples, such as {high:016x}{low:016x} to {' and '.join(names)}: DataComp's "
        f"resharder would write all of them; {_REMEDY}"
    )
