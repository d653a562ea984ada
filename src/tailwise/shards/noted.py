"""Notes of the sources of a catalog about its samples: url, sha256 and md5, of tables or of JSON in tars; and the hashes that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.catalog import REPLACED_BY, Catalog, Part
from tailwise.catalog.files import read_record
from tailwise.catalog.noted import HASH_COLUMNS, KEPT, noted_hashes
from tailwise.execution.keys import HASH, as_hashes
from tailwise.shards.columns import BATCH_ROWS, DAMAGE, table_at, texts
from tailwise.shards.containers import IMAGES, METADATA, Container, containers_of
from tailwise.shards.members import json_caption
from tailwise.shards.metadata import sidecar_path
from tailwise.shards.packed import plain
from tailwise.shards.parquet_images import KEY_COLUMNS
from tailwise.storage.files import open_binary


def hashes_of_part(catalog: Catalog, part: Part, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the hash of `name`, one of NOTED, of each row of a part, HASH [rows], and where something notes it, bool [rows].

    The sources are read only if an older version imported the part, which kept no hashes.

    Raises:
        OSError: a tar cannot be read.
    """
    path, column = catalog.samples_path(part.number), HASH_COLUMNS[name]
    if column in pq.read_schema(path).names:
        return as_hashes(catalog.samples(part, [column]).column(0))
    if name in read_record(layout.marker(path)).get(KEPT, ()):
        return np.zeros(part.rows, HASH), np.zeros(part.rows, np.bool_)
    return as_hashes(noted_hashes(name, pa.array(noted_texts(catalog, part, name), pa.string())))


def noted_texts(catalog: Catalog, part: Part, name: str) -> list[str]:
    """Return `name`, one of NOTED, of each row of a part; "" where nothing notes it.

    Of a tar, the table beside it is read (img2dataset's sidecar), or, without one, the JSON of each sample; of other shards, their file.

    Raises:
        OSError: a tar cannot be read.
    """
    found: list[str] = []
    for path, container, samples in _by_shard(catalog, part):
        if REPLACED_BY in path:
            found += [""] * len(samples)
            continue
        by_key = dict(_of_table(path, container, name))
        keys: list[str] = samples.column("key").to_pylist()
        values = [by_key.get(key, by_key.get(key.lower(), "")) for key in keys]
        if not path.endswith(METADATA.suffix) and not any(values):
            values = [_value(content, name) for content in _jsons(path, samples)]
        found += values
    return found


def jsons_of(catalog: Catalog, part: Part) -> Iterator[tuple[str, str, bytes]]:
    """Yield the path of the shard, the key, and the JSON of each row of a part; b"" where there is none.

    Raises:
        OSError: a tar cannot be read.
    """
    for path, _, samples in _by_shard(catalog, part):
        without = path.endswith(METADATA.suffix) or REPLACED_BY in path
        contents = [b""] * len(samples) if without else _jsons(path, samples)
        for key, content in zip(samples.column("key").to_pylist(), contents, strict=True):
            yield path, key, content


def _by_shard(catalog: Catalog, part: Part) -> Iterator[tuple[str, Container, pa.Table]]:
    """Yield path and container of each shard of a part, and its samples, in row order."""
    samples, table = catalog.samples(part, ["shard", "key", "json_offset", "json_bytes"]), catalog.shards()
    shards = samples.column("shard").to_numpy()
    bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
    mine = table.take(pa.array(shards[bounds[:-1]]))
    paths, containers = mine.column("path").to_pylist(), containers_of(mine)
    for path, container, (start, stop) in zip(paths, containers, pairwise(bounds), strict=True):
        yield path, container, samples.slice(start, stop - start)


def _jsons(path: str, samples: pa.Table) -> Iterator[bytes]:
    """Yield the JSON of each sample of a tar; b"" where there is none."""
    places = [samples.column(f"json_{what}").to_pylist() for what in ("offset", "bytes")]
    with open_binary(path) as file, plain(path, file) as stream:
        for offset, size in zip(*places, strict=True):
            if offset is not None:
                stream.seek(offset)
            yield b"" if offset is None else stream.read(size)


def _value(content: bytes, name: str) -> str:
    with suppress(OSError):
        return json_caption(content, (name,)).decode()
    return ""


def _of_table(path: str, container: Container, name: str) -> Iterator[tuple[str, str]]:
    """Yield key and value of each row of the table of a shard; nothing where there is no such table."""
    number = "d"  # format of the number of a row
    # of DataComp's metadata, of LAION's, and the number of the row
    identifiers: tuple[str, ...] = ("uid", "sample_id", "")
    if container is IMAGES:
        identifiers, number = (*KEY_COLUMNS, ""), "09d"
    elif container is not METADATA:
        path, identifiers = sidecar_path(path), ("key",)
    try:
        with table_at(path) as file:
            there = {column.lower(): column for column in file.schema_arrow.names} | {"": ""}
            id_column = next((there[column] for column in identifiers if column in there), None)
            if id_column is None or name not in there:
                return
            columns, first = list(filter(None, [there[name], id_column])), 0
            for batch in file.iter_batches(BATCH_ROWS, columns):
                read = [texts(batch.column(column), column).fill_null("").to_pylist() for column in columns]
                rows = range(first, first + len(batch))
                keys = read[1] if id_column else [format(row, number) for row in rows]
                first += len(batch)
                for key, value in zip(keys, read[0], strict=True):
                    yield (key.lower() if id_column.lower() == "uid" else key), value
    except DAMAGE:  # the import has reported it
        return
