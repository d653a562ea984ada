"""Embeddings that samples keep when their file is replaced: those of the same image, or the same caption, in the file's earlier state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.columns import RowColumn
from tailwise.catalog.embeddings import (
    ENCODER,
    MODALITIES,
    column_names,
    column_record,
    embeddings_of,
    part_marker,
    present,
    write_part,
)
from tailwise.catalog.schema import REPLACES

CHUNK_ROWS = 8192
_PLACES = ("image_offset", "image_bytes")


def kept_rows(catalog: Catalog, column: str, part: Part) -> npt.NDArray[np.int64]:
    """Return the row whose embedding each row of a part keeps: int64 [rows], −1 where there is none.

    It has the same key in the earlier state of the file. Of images it is at the same place, within the bytes that did not change
    (`fingerprint.unchanged_bytes`). Captions are the same text; those that were joined from tables are none of the file's.
    """
    kept, record, table = np.full(part.rows, -1, np.int64), column_record(catalog, column), _replacing(catalog)
    new = table.filter(pc.equal(table["part"], part.number)).to_pylist()
    if not new or record["modality"] not in MODALITIES or "captions" in record["settings"]:
        return kept
    shards = catalog.shards().select(["shard", "part", "rows"])
    first = np.cumsum([0, *shards["rows"].to_pylist()])
    parts, names = catalog.parts(), ["key", "caption", *_PLACES]
    for shard in new:
        (old,) = shards.slice(shard[REPLACES]["shard"], 1).to_pylist()
        if not part_marker(catalog, column, parts[old["part"]]).exists():
            continue
        before, after = (
            catalog.samples_at(
                one["part"], np.arange(one["rows"]) + first[one["shard"]] - parts[one["part"]].first_row, names
            )
            for one in (old, shard)
        )
        same = _same(before, after, shard[REPLACES]["same_bytes"] if record["modality"] == "image" else None)
        start = first[shard["shard"]] - part.first_row
        kept[start : start + shard["rows"]] = np.where(same >= 0, first[old["shard"]] + same, -1)
    known, vectors = np.flatnonzero(kept >= 0), embeddings_of(catalog, column)
    for at in range(0, len(known), CHUNK_ROWS):
        some = known[at : at + CHUNK_ROWS]
        kept[some[~present(vectors[kept[some]])]] = -1
    return kept


def _replacing(catalog: Catalog) -> pa.Table:
    """Return the shards that replace others (SHARD_SCHEMA)."""
    shards = catalog.shards()
    return shards.filter(shards[REPLACES].is_valid())


def _same(before: pa.Table, after: pa.Table, same_bytes: int | None) -> npt.NDArray[np.int64]:
    """Return the position of each sample in an earlier table, −1 where it is another one: of images, or of captions (None)."""
    names = ["caption"] if same_bytes is None else list(_PLACES)
    found = {row.pop("key"): (at, row) for at, row in enumerate(before.select(["key", *names]).to_pylist())}
    same = np.full(len(after), -1, np.int64)
    for at, row in enumerate(after.select(["key", *names]).to_pylist()):
        place, earlier = found.get(row.pop("key"), (-1, None))
        if row == earlier and (same_bytes is None or 0 <= row["image_offset"] <= same_bytes - row["image_bytes"]):
            same[at] = place
    return same


def keep_imported(catalog: Catalog) -> list[tuple[str, int, int]]:
    """Fill imported columns in parts of files that were replaced, as far as samples keep their embeddings.

    Returns:
        Of each part, the name of the column, how many samples kept theirs, and how many samples it has.
    """
    replacing = set(_replacing(catalog)["part"].to_pylist())
    filled = []
    for column in column_names(catalog) if replacing else ():
        record = column_record(catalog, column)
        for part in (part for part in catalog.parts() if part.number in replacing):
            if record["encoder"] != ENCODER or part_marker(catalog, column, part).exists():
                continue
            kept, vectors = kept_rows(catalog, column, part), embeddings_of(catalog, column)
            if (kept >= 0).any():
                chunks = (take(vectors, kept[at : at + CHUNK_ROWS]) for at in range(0, part.rows, CHUNK_ROWS))
                filled.append((column, write_part(catalog, column, part, record["dimension"], chunks), part.rows))
    return filled


def take(vectors: RowColumn, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    """Return the embeddings of rows, float16 [n, d]; zeros for negative ones."""
    taken = np.zeros((len(rows), *vectors.shape), np.float16)
    taken[rows >= 0] = vectors[rows[rows >= 0]]
    return taken
