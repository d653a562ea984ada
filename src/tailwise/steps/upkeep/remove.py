"""Remove: tombstones for the samples that a file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.removals import NAMES_SCHEMA, Removing, removals_folder
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError
from tailwise.shards.columns import DAMAGE, open_table
from tailwise.storage.delimited import read_keys
from tailwise.storage.local import locked
from tailwise.text import is_unicode

UID = re.compile(r"[0-9a-fA-F]{32}")
DEFAULT_REASON = "on request"


@dataclass(frozen=True)
class RemovalReport:
    """Result of a removal.

    Attributes:
        number: of the removal; None where nothing was written.
        reason: as given.
        names: keys and uids that the file gives.
        repeated: of these, lines that an earlier line repeats.
        known: of these, named by an earlier removal.
        removed: samples that are removed by it.
        removed_before: samples it names that had been removed.
        several: keys and uids that several samples have; all of those samples are removed.
        of_several: how many samples these are.
        ambiguous: lines that are the key of one sample and the uid of another; taken as keys.
        unknown: keys and uids that no sample has. They are remembered: a sample imported later is removed at once.
        removed_in_all: samples of the newest snapshot that are removed, by all removals.
    """

    number: int | None
    reason: str
    names: int
    repeated: int
    known: int
    removed: int
    removed_before: int
    several: int
    of_several: int
    ambiguous: list[str]
    unknown: list[str]
    removed_in_all: int

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return asdict(self)


def remove(
    catalog: Catalog, path: Path, *, reason: str = DEFAULT_REASON, dry_run: bool = False, context: Context | None = None
) -> RemovalReport:
    """Removes samples: no plan made afterwards draws them, no export holds them, and training on an old plan replaces them.

    Nothing is deleted. Doing it again does nothing new.

    Args:
        catalog: of the samples.
        path: .txt with a key or uid (32 hexadecimal digits) a line, see `delimited`; or .parquet with uid, or key, or shard (its path) and
            key.
        reason: is kept.
        dry_run: only report what would be done.
        context: runs the tasks and shows progress.

    Raises:
        UserError: the file can't be read or names no sample, or the catalog is empty, or somebody else is removing.
    """
    context = context or Context()
    table = read_names(path)
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


def read_names(path: Path) -> pa.Table:
    """The keys and uids of a file, NAMES_SCHEMA.

    Raises:
        UserError: it can't be read, or names no sample.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} is no file: give a .txt of a key or uid a line, or a .parquet")
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: keys are read from a file ending in {' or '.join(_READERS)}")
    table = _READERS[path.suffix.lower()](path)
    if not table.num_rows:
        raise UserError(f"{path} names no sample: give a key or uid a line")
    return table


def _read_text(path: Path) -> pa.Table:
    keys = read_keys(path)
    uids = [bytes.fromhex(uid) if UID.fullmatch(uid := key.strip(" \t")) else None for key in keys]
    return _table(keys, uids, None)


def _read_parquet(path: Path) -> pa.Table:
    try:
        with open_table(path) as file:
            names = file.schema_arrow.names
            columns = ["uid"] if "uid" in names else [name for name in ("key", "shard") if name in names]
            given = file.read(columns) if columns else None
        lists = {name: given.column(name).to_pylist() for name in columns} if given is not None else {}
    except DAMAGE as error:
        raise UserError(f"{path} can't be read as Parquet: {error}") from error
    if given is None or columns not in (["uid"], ["key"], ["key", "shard"]):
        raise UserError(f"{path} needs the column uid, or key, or key and shard; it has {', '.join(names)}")
    for name, values in lists.items():
        if None in values:
            raise UserError(f"row {values.index(None):,} of {path} has no {name}: each row must name a sample")
    if columns == ["uid"]:
        return _table(None, [_uid(path, value) for value in lists["uid"]], None)
    texts = {name: [_text(path, name, value) for value in values] for name, values in lists.items()}
    return _table(texts["key"], None, texts.get("shard"))


_READERS: Mapping[str, Callable[[Path], pa.Table]] = {".txt": _read_text, ".parquet": _read_parquet}


def _uid(path: Path, value: object) -> bytes:
    if isinstance(value, str) and UID.fullmatch(value):
        return bytes.fromhex(value)
    if isinstance(value, bytes) and len(value) == 16:
        return value
    raise UserError(f"{path}: the uid {value!r} is none: give 32 hexadecimal digits, or 16 bytes")


def _text(path: Path, name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise UserError(f"{path}: the {name} {value!r} is no text" + (": give the shard's path" if name == "shard" else ""))


def _table(keys: list[str] | None, uids: list[bytes | None] | list[bytes] | None, shards: list[str] | None) -> pa.Table:
    given = {"key": keys, "uid": uids, "shard": shards}
    rows = next(len(values) for values in given.values() if values is not None)
    columns = [pa.array(values or [None] * rows, NAMES_SCHEMA.field(name).type) for name, values in given.items()]
    return pa.table(columns, schema=NAMES_SCHEMA)
