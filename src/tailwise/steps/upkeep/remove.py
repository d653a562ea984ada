"""Remove: tombstones for the samples that a file names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import read_record
from tailwise.catalog.noted import HEX_DIGITS, KEPT, NOTED, noted_hash
from tailwise.catalog.removals import NAMES_SCHEMA, Removing, removals_folder
from tailwise.context import Context
from tailwise.errors import NotFoundError, UnsupportedError, UserError
from tailwise.shards.columns import DAMAGE
from tailwise.steps.importing.join import column_names, read_table_columns
from tailwise.steps.importing.listed import MATCHES, guessed, kinds_there, name_columns
from tailwise.storage.delimited import read_keys
from tailwise.storage.local import locked
from tailwise.text import did_you_mean, is_unicode

UID = re.compile(r"[0-9a-fA-F]{32}")
DEFAULT_REASON = "on request"
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class RemovalReport:
    """Result of a removal."""

    number: int | None  # of the removal; None where nothing was written
    reason: str  # as given
    names: int  # keys, uids, urls and hashes that the file gives
    repeated: int  # of these, lines that an earlier line repeats
    known: int  # of these, named by an earlier removal
    removed: int  # samples that are removed by it
    removed_before: int  # samples it names that had been removed
    several: int  # names that several samples have; all of those samples are removed
    of_several: int  # how many samples these are
    ambiguous: list[str]  # lines that are the key of one sample and the uid of another; taken as keys
    unknown: list[str]  # names that no sample has. They are remembered: a sample imported later is removed at once.
    removed_in_all: int  # samples of the newest snapshot that are removed, by all removals

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return asdict(self)


def remove(
    catalog: Catalog,
    path: Path,
    *,
    reason: str = DEFAULT_REASON,
    match: str | None = None,
    dry_run: bool = False,
    context: Context | None = None,
) -> RemovalReport:
    """Removes samples: no plan made afterwards draws them, no export holds them, and training on an old plan replaces them.

    Nothing is deleted. Doing it again does nothing new.

    `path`: .txt with a key, uid (32 hexadecimal digits), url or sha256 (64) a line, see `delimited`; or a table with uid, or key, or shard
    (its path) and key, or url, sha256 or md5. `match`: what the file names samples by, one of MATCHES; None for what it has.

    Raises:
        UserError: the file can't be read or names no sample, or the catalog is empty, or somebody else is removing.
    """
    context = context or Context()
    table = read_names(path, match)
    _require_hashes(catalog, table)
    if not reason.strip():
        raise UserError("`reason` is empty: say why, or leave it out")
    if not is_unicode(reason):
        raise UserError(f"`reason` {reason!r} is not UTF-8, and could not be listed later")
    folder = removals_folder(catalog)
    with nullcontext() if dry_run else locked(folder / layout.LOCK, str(folder)):
        if not dry_run:
            catalog.series(layout.REMOVALS).settle()
        found = Removing.find(catalog, table, context.progress)
        new = found.new
        number = found.write(reason).number if len(found.names) and not dry_run else None
    several = found.samples > 1
    return RemovalReport(
        number,
        reason,
        table.num_rows,
        found.repeated,
        found.known,
        len(new),
        len(found.rows) - len(new),
        int(several.sum()),
        int(found.samples[several].sum()),
        found.ambiguous,
        found.names.texts(np.flatnonzero(found.samples == 0)),
        len(found.before.rows) + len(new),
    )


def read_names(path: Path, match: str | None = None) -> pa.Table:
    """Return the names of a file, NAMES_SCHEMA; `match` is their kind, one of MATCHES, or None for what the file has.

    Raises:
        UserError: it can't be read, or names no sample.
    """
    if match is not None and match not in MATCHES:
        raise UserError(f"`match` {match!r}: {did_you_mean(match, MATCHES)}")
    if not path.is_file():
        raise NotFoundError(f"{path} is no file: give a .txt of a name a line, or a table ({', '.join(TABLES)})")
    if path.suffix.lower() not in {".txt", *TABLES}:
        raise UserError(f"{path}: keys are read from a file ending in .txt or {', '.join(TABLES)}")
    table = _read_text(path, match) if path.suffix.lower() == ".txt" else _read_table(path, match)
    if not table.num_rows:
        raise UserError(f"{path} names no sample: give a key, uid, url or hash a line")
    for name in NOTED:
        given = table.column(name).drop_null().to_pylist()
        for text in (text for text in given if noted_hash(name, text) is None):
            wanted = f"{HEX_DIGITS[name]} hexadecimal digits" if name in HEX_DIGITS else "an address"
            raise UserError(f"{path}: the {name} {text!r} is none: give {wanted}")
    return table


def _read_text(path: Path, match: str | None) -> pa.Table:
    if match == "shard":
        raise UserError(f"`match` shard needs a table with the columns shard and key; {path} is none")
    lists: dict[str, list[Any]] = {name: [] for name in NAMES_SCHEMA.names}
    for key in read_keys(path):
        line = key.strip(" \t")
        guess = guessed(line)[0]
        kind = match or (guess if guess in NOTED else "key")
        row: dict[str, Any] = {kind: key if kind == "key" else line}
        if kind == "uid" or (match is None and UID.fullmatch(line)):
            row["uid"] = _uid(path, line)
        for name, values in lists.items():
            values.append(row.get(name))
    return _table(lists)


def _read_table(path: Path, match: str | None) -> pa.Table:
    names = column_names(path)
    kind = next((kind for kind in kinds_there(names, match) if kind in MATCHES), None)
    if kind is None:
        either = "uid, or key, or key and shard, or url, sha256 or md5"
        needed = " and ".join(name_columns(names)[match]) if match else either
        raise UserError(f"{path} needs the column {needed}; it has {', '.join(names)}")
    columns = ("shard", "key") if kind == "shard" else (kind,)
    lists: dict[str, list[Any]] = {name: [] for name in columns}
    try:
        for arrays in read_table_columns(path, name_columns(names)[kind]):
            for name, values in zip(columns, arrays, strict=True):
                lists[name] += values.to_pylist()
    except DAMAGE as error:
        raise UserError(f"{path} can't be read: {error}") from error
    for name, values in lists.items():
        if None in values:
            raise UserError(f"row {values.index(None):,} of {path} has no {name}: each row must name a sample")
    read = {name: _uid if name == "uid" else partial(_text, name=name) for name in columns}
    return _table({name: [read[name](path, value) for value in values] for name, values in lists.items()})


def _uid(path: Path, value: object) -> bytes:
    if isinstance(value, str) and UID.fullmatch(value):
        return bytes.fromhex(value)
    if isinstance(value, bytes) and len(value) == 16:
        return value
    raise UserError(f"{path}: the uid {value!r} is none: give 32 hexadecimal digits, or 16 bytes")


def _text(path: Path, value: object, *, name: str) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{path}: the {name} {value!r} is no text" + (": give the shard's path" if name == "shard" else ""))


def _table(given: Mapping[str, list[Any]]) -> pa.Table:
    rows = len(next(iter(given.values())))
    columns = [pa.array(given.get(item.name, [None] * rows), item.type) for item in NAMES_SCHEMA]
    return pa.table(columns, schema=NAMES_SCHEMA)


def _require_hashes(catalog: Catalog, table: pa.Table) -> None:
    """Refuse urls and hashes where an older version imported samples, and kept none: they would stay."""
    asked = {name for name in NOTED if table.column(name).null_count < len(table)}
    parts = [
        part
        for part in catalog.parts()
        if not asked <= {*read_record(layout.marker(catalog.samples_path(part.number))).get(KEPT, ())}
    ]
    if parts:
        raise UnsupportedError(
            f"{sum(part.rows for part in parts):,} samples were imported by an older version, which kept no {' and '.join(sorted(asked))}: "
            "name their uids or keys, or import the pool into a new catalog"
        )
