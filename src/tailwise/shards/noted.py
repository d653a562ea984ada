"""What the sources of a catalog note of its samples beside what the catalog holds: sha256 and url, of tables or of JSON in tars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Part
from tailwise.shards.columns import BATCH_ROWS, DAMAGE, open_table, texts
from tailwise.shards.containers import container_of
from tailwise.shards.packed import plain
from tailwise.storage.files import open_binary

NOTED = ("sha256", "url")
METADATA_IDS = ("uid", "sample_id", "")  # of DataComp's metadata, of LAION's, and the number of the row


def noted_texts(catalog: Catalog, part: Part, name: str) -> list[str]:
    """Return `name`, one of NOTED, of each row of a part; "" where nothing notes it.

    Of a tar, the table beside it is read (img2dataset's sidecar), or, without one, the JSON of each sample; of metadata, the file.

    Raises:
        OSError: a tar cannot be read.
    """
    samples = catalog.samples(part, ["shard", "key", "json_offset", "json_bytes"])
    shards, found = samples.column("shard").to_numpy(), [""] * part.rows
    paths: list[str] = catalog.shards().column("path").to_pylist()
    for shard in np.unique(shards).tolist():
        rows = np.flatnonzero(shards == shard)
        mine = samples.take(pa.array(rows))
        path = paths[shard]
        has_bytes = container_of(path).has_bytes
        table, identifiers = (f"{path.removesuffix('.tar')}.parquet", ("key",)) if has_bytes else (path, METADATA_IDS)
        by_key = dict(_of_table(table, name, identifiers))
        values = [by_key.get(key, "") for key in mine.column("key").to_pylist()]
        if has_bytes and not any(values):
            values = list(_of_json(path, mine, name))
        for row, value in zip(rows.tolist(), values, strict=True):
            found[row] = value
    return found


def _of_table(path: str, name: str, identifiers: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield key, which is a uid in lower case, and value of each row; nothing where there is no such table.

    The key is in the first of `identifiers` that the table has; "" stands for the number of the row.
    """
    try:
        with open_binary(path) as stream, open_table(stream) as file:
            there = {column.lower(): column for column in file.schema_arrow.names} | {"": ""}
            id_column = next((there[column] for column in identifiers if column in there), None)
            if id_column is None or name not in there:
                return
            columns, first = list(filter(None, [there[name], id_column])), 0
            for batch in file.iter_batches(BATCH_ROWS, columns):
                read = [texts(batch.column(column), column).fill_null("").to_pylist() for column in columns]
                keys = read[1] if id_column else map(str, range(first, first + len(batch)))
                first += len(batch)
                for key, value in zip(keys, read[0], strict=True):
                    yield (key.lower() if id_column.lower() == "uid" else key), normalised(name, value)
    except DAMAGE:  # the import has reported it
        return


def _of_json(path: str, samples: pa.Table, name: str) -> Iterator[str]:
    """Yield the value in the JSON of each sample of a tar; "" where the sample has none."""
    with open_binary(path) as file, plain(path, file) as stream:
        for offset, size in zip(
            *(samples.column(f"json_{what}").to_pylist() for what in ("offset", "bytes")), strict=True
        ):
            value = None
            if offset is not None:
                stream.seek(offset)
                with suppress(ValueError, RecursionError):
                    value = json.loads(stream.read(size))
            text = value.get(name) if isinstance(value, dict) else None
            yield normalised(name, text) if isinstance(text, str) else ""


def normalised(name: str, text: str) -> str:
    """Return a text as it is compared: a sha256 in lower case."""
    return text.lower() if name == "sha256" else text
