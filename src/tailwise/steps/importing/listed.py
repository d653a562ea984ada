"""Lists of samples made elsewhere: DataComp's subsets, text, tables, and JSON of rates; by uid, key, shard and key, url or hash."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ijson
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog.catalog import Catalog, Snapshot
from tailwise.catalog.noted import HEX_DIGITS, NOTED
from tailwise.errors import NotFoundError, UserError, check_share
from tailwise.execution.keys import HASH
from tailwise.progress import Track, silent
from tailwise.shards.columns import DAMAGE, numbers, texts, uid_texts
from tailwise.sources.embedding_files import StoredRows
from tailwise.steps.importing.join import BATCH, NO_KEY, batched, column_names, read_table_columns
from tailwise.steps.importing.names import Entries, Matched, NameIndex, Names, match_names, place_name, sample_hashes
from tailwise.storage.delimited import iterate_keys
from tailwise.text import did_you_mean

MATCHES = ("uid", "key", "shard", *NOTED)  # kinds of names that users can choose
SUFFIXES = (".npy", ".txt", ".parquet", ".csv", ".tsv", ".jsonl")
_VALUED = ("uint64", "uint64", "f")  # fields of a .npy of uids and values
_HEX = re.compile("[0-9a-fA-F]+")


@dataclass(frozen=True)
class SampleList:
    """A file that names samples, a value beside each or none.

    Attributes:
        path: .npy of DataComp (dtype "u8,u8": uids; with a third field, a float, also values), .txt with a name a line, a table (.parquet,
            .csv, .tsv, .jsonl) with a column of names, or .json {name: value}.
        what: the values are called, in errors.
        match: kind of the names, one of MATCHES; None for the one that fits best, see `kinds`.
        column: of a table, with the values; None for none. Other files have no columns.
    """

    path: Path
    what: str = "samples"
    match: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        """Refuse a kind that is unknown, and a file that is none."""
        if self.match is not None and self.match not in MATCHES:
            raise UserError(f"`match` {self.match!r}: {did_you_mean(self.match, MATCHES)}")
        if not self.path.is_file():
            raise NotFoundError(f"{self.path} is no file: give a {', '.join(SUFFIXES)} file that names samples")

    @property
    def counted(self) -> bool:
        """True if the file has no values: then each name counts as often as it is given."""
        return self.column is None and not (self._suffix == ".json" or (self._suffix == ".npy" and self._has_numbers))

    @property
    def _has_numbers(self) -> bool:
        with self._reading():
            return len(StoredRows.of_file(self.path).dtype.names or ()) == len(_VALUED)

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of names to try: the given one; else the columns of a table, or what the first name may be.

        Raises:
            UserError: the file cannot be read, or does not name samples so.
        """
        if self._suffix == ".npy":
            if self.match not in {None, "uid"}:
                raise UserError(f"`match` {self.match} does nothing with {self.path}: a .npy holds uids")
            return ("uid",)
        if self._suffix not in {".txt", ".json"}:
            return self._kinds_of_table()
        if self.match == "shard":
            raise UserError(f"`match` shard needs a table with the columns shard and key; {self.path} is none")
        with self._reading():
            first = next((name for names, _ in self._read("key") for name in islice(names, 1)), "")
        return (self.match,) if self.match else guessed(str(first))

    def _kinds_of_table(self) -> tuple[str, ...]:
        names = column_names(self.path)
        columns = name_columns(names)
        found = tuple(kinds_there(names, self.match))
        values = [] if self.column is None else [self.column]
        if not found or not {*values} <= {*names}:
            wanted = [f"the column {name!r}" for name in values]
            wanted.append(" and ".join(columns[self.match]) if self.match else f"one of {', '.join(columns)}")
            raise UserError(f"{self.path} needs {' and '.join(wanted)}; it has {', '.join(names) or 'none'}")
        for name in [*values, *columns[found[0]]]:
            if names.count(name) > 1:
                raise UserError(f"{self.path} has {names.count(name)} columns called {name!r}: give it one")
        return found

    def entries(self, kind: str) -> Iterator[Entries]:
        """Yield the names of a kind and their values, float64 [n], in batches; a UserError if they cannot be read."""
        with self._reading():
            yield from self._read(kind)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except ijson.JSONError as error:
            raise UserError(f"{self.path} is not a JSON object of name → {self.what}: {error}") from error
        except (*DAMAGE, TypeError, OverflowError) as error:
            if self._suffix == ".json":
                raise UserError(f"{self.path} is not a JSON object of name → {self.what}: {error}") from error
            raise UserError(f"the {self.what} of {self.path} can't be read: {error}") from error

    def _read(self, kind: str) -> Iterator[Entries]:
        if self._suffix == ".npy":
            yield from _subset(self.path)
        elif self._suffix == ".json":
            yield from _json_entries(self.path)
        elif self._suffix == ".txt":
            yield from ((_stripped(kind, [key for _, (key,) in batch]), None) for batch in batched(
                (number, (key,)) for number, key in iterate_keys(self.path)))  # fmt: skip
        else:
            yield from self._table(kind)

    def _table(self, kind: str) -> Iterator[Entries]:
        columns = name_columns(column_names(self.path))[kind]
        given = [] if self.column is None else [self.column]
        for arrays in read_table_columns(self.path, [*columns, *given]):
            parts = [_texts(kind, values, name) for name, values in zip(columns, arrays, strict=False)]
            names = parts[0] if len(parts) == 1 else [place_name(*pair) for pair in zip(*parts, strict=True)]
            values = numbers(arrays[-1], self.column).to_numpy(zero_copy_only=False) if self.column else None
            yield names, values


def name_columns(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the columns that a table with columns of these names has for each kind of name, the preferred kind first.

    Columns of urls and hashes may be in any case.
    """
    lower = {name.lower(): name for name in reversed(names)}
    noted = {kind: (lower.get(kind, kind),) for kind in ("sha256", "md5", "url")}
    return {"uid": ("uid",), "shard": ("shard", "key"), "key": ("key",), "image_path": ("image_path",), **noted}


def kinds_there(names: Sequence[str], match: str | None) -> list[str]:
    """Return the kinds of names that a table with columns of these names has, the preferred kind first; only `match`, if it is given."""
    there = [kind for kind, columns in name_columns(names).items() if {*columns} <= {*names}]
    return [kind for kind in there if kind == match or (match is None and (kind != "key" or "shard" not in there))]


def has_columns(path: Path) -> bool:
    """Return True if a list is a table."""
    return path.suffix.lower() not in {".json", ".npy", ".txt"}


def guessed(name: str) -> tuple[str, ...]:
    """Return the kinds that a name without a column may be, the likeliest first."""
    digits = len(name) if _HEX.fullmatch(name.strip()) else 0
    if "://" in name:
        return ("url", "key")
    return {HEX_DIGITS["sha256"]: ("sha256", "key"), 32: ("uid", "key", "md5")}.get(digits, ("key",))


def _stripped(kind: str, names: list[str]) -> list[str]:
    return names if kind == "key" else [name.strip() for name in names]


def _texts(kind: str, values: pa.Array, name: str) -> list[str]:
    found = (uid_texts if kind == "uid" else texts)(values, name)
    return list(found.fill_null(NO_KEY).to_pylist())


def _subset(path: Path) -> Iterator[Entries]:
    """Yield the uids of DataComp's subset file as hashes, and the values of its third field."""
    stored = StoredRows.of_file(path)
    halves = stored.dtype.names or ()
    kinds = ["uint64" if stored.dtype[half].str[1:] == "u8" else stored.dtype[half].kind for half in halves]
    if len(stored.shape) != 1 or tuple(kinds) not in {_VALUED[:2], _VALUED}:
        raise ValueError(
            f"it holds {stored.dtype} {list(stored.shape)}; DataComp's subsets are 1-D arrays of dtype u8,u8, or u8,u8,f4 with values"
        )
    for start in range(0, len(stored), BATCH):
        given = stored[start : start + BATCH]
        names = np.empty(len(given), HASH)
        for field, half in zip(HASH.names or (), halves, strict=False):
            names[field] = given[half].astype(">u8").view("<u8")  # the hash of a uid is its bytes
        yield names, given[halves[2]].astype(np.float64) if len(halves) == len(_VALUED) else None


def _json_entries(path: Path) -> Iterator[Entries]:
    keys: list[str] = []
    values: list[float] = []
    with path.open("rb") as stream:
        head = stream.read(4096)
        if head.removeprefix(BOM_UTF8).lstrip()[:1] != b"{":
            raise TypeError("it doesn't begin with {")
        stream.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)
        for key, value in _read_json(stream):
            keys.append(key)
            values.append(value)
            if len(keys) == BATCH:
                yield keys, np.array(values)
                keys, values = [], []
    yield keys, np.array(values)


def _read_json(stream: IO[bytes]) -> Iterator[tuple[str, float]]:
    """Yield names and values event by event: nested values, which ijson would build without a bound on the depth, end it at once."""
    key: str | None = None
    for event, value in ijson.basic_parse(stream, use_float=True):
        if event == "map_key":
            key = value
        elif event == "number" and key is not None:
            yield key, float(value)
        elif event != "end_map" and not (event == "start_map" and key is None):
            shown = repr(value) if event in {"string", "boolean", "null"} else "no number"
            raise TypeError(f"the value of {key!r} is {shown}")


def read_list(
    catalog: Catalog,
    snapshot: Snapshot,
    listed: SampleList,
    work: Path,
    track: Track = silent,
    check: Callable[[Names, npt.NDArray[np.float64]], None] | None = None,
) -> Matched:
    """Return the names of a list, matched to samples by the kind that fits best (see `match_names`).

    Args:
        catalog: with the samples.
        snapshot: whose rows.
        listed: the list.
        work: a folder for the indexes.
        track: shows progress.
        check: refuses bad values of a batch of names.
    """

    def entries(kind: str) -> Iterator[Entries]:
        for names, values in track(listed.entries(kind), f"reading {listed.what}"):
            if check is not None and values is not None:
                check(names, values)
            yield names, values

    return match_names(catalog, snapshot, listed.kinds, entries, work)


def no_match(catalog: Catalog, snapshot: Snapshot, listed: SampleList, kind: str, index: NameIndex) -> UserError:
    """Return the error for a list of which no name belongs to a sample; `kind` is the last that was tried."""
    if not index.count:
        return UserError(f"{listed.path} is empty: give a file that names samples")
    noted = all(not sample_hashes(catalog, part, kind)[1].any() for part in catalog.parts(snapshot))
    example = "" if index.example is None else f" (the first is {index.example!r})"
    remedy = "give a list of this pool" + ", or another `match`" * (listed.path.suffix.lower() != ".npy")
    tried = " or ".join(listed.kinds)
    why = f": the import found no {kind} beside the samples" * noted
    return UserError(
        f"none of {index.count:,} names in {listed.path}{example} is the {tried} of a sample{why}; {remedy}"
    )


def check_matched(strict: float | None, found: Mapping[str, Any], source: str) -> None:
    """Refuse a smaller share of the names of a source than `strict` that belong to samples, by "names" and "names_matched" of figures.

    Artifacts of older versions have no such figures, and are taken as they are.
    """
    if strict is None:
        return
    check_share(strict, "strict")
    share = found["names_matched"] / max(found["names"], 1) if "names" in found else 1.0
    if share < strict:
        example = "" if found.get("example") is None else f", such as {found['example']!r},"
        raise UserError(
            f"{found['names'] - found['names_matched']:,} of {found['names']:,} names in {source}{example} belong to no sample: the others "
            f"are {share:.2%}, less than `strict` {strict:g}; give a list of this pool, or a smaller `strict`"
        )
