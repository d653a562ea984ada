"""img2dataset's sidecar `{shard}.parquet`: sizes, uid and scores of a tar's samples, by key."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from tailwise.shards.columns import (
    DAMAGE,
    UserTable,
    numbers,
    open_table,
    score_columns,
    sides,
    texts,
    uid_texts,
    value_type,
)
from tailwise.storage.files import open_binary

SIDES = ("width", "height")
STAGE = "sidecar"
_UID = re.compile("[0-9a-fA-F]{32}")
Record = dict[str, Any]


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
                {"stage": STAGE, "reason": reason, "file": self.path, "key": key, "detail": detail, "rows": rows}
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


def parse_uid(value: object) -> bytes | None:
    """Return the 16 bytes of a uid of 32 hexadecimal digits, or None."""
    return bytes.fromhex(value) if isinstance(value, str) and _UID.fullmatch(value) else None
