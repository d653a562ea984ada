"""Removals: tombstones. A removal names keys and uids, and holds for every sample that has one of them, now or imported later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.files import file_digest, read_array, read_json, read_table, write_array, write_json, write_table
from tailwise.catalog.locks import locked
from tailwise.progress import Track, silent

NAMES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("uid", pa.binary(16)),  # beside a key: the text may be either
        pa.field("shard", pa.string()),  # path or URL: the key is meant in this one only
    ]
)
# As stored: with the id of the shard, where it was in the catalog by that path; paths may change (`relocate`), ids don't.
STORED_SCHEMA = NAMES_SCHEMA.append(pa.field("shard_id", pa.int32()))
NOBODY = np.iinfo(np.int64).max
WAYS = 4  # of naming a sample


@dataclass(frozen=True)
class Removal:
    """One finished removal.

    Attributes:
        number: 1, 2, …
        reason: as given.
        date: of the day, in UTC, as ISO 8601 has it.
        names: how many keys and uids it names.
        digest: hash of the file that lists them.
    """

    number: int
    reason: str
    date: str
    names: int
    digest: str


@dataclass(frozen=True, eq=False)
class Removals:
    """All samples of a snapshot that were removed.

    Attributes:
        rows: int64 [R], ascending.
        numbers: int64 [R], the removal that each row owes it to, the first one.
        removals: all of the catalog, by number; some may name nobody in the snapshot.
    """

    rows: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    removals: tuple[Removal, ...]

    @classmethod
    def of(cls, catalog: Catalog, snapshot: Snapshot | None = None, track: Track = silent) -> Removals:
        """What was removed from a snapshot, the newest by default.

        The first time after an import it looks for the names among the new samples, and keeps what it found in the catalog (in memory
        only, where that can't be written to).

        Raises:
            UserError: a file of the removals is missing or damaged.
        """
        removals = tuple(read_removals(catalog))
        if not removals:
            return NOTHING_REMOVED
        newest = catalog.snapshot()
        rows, numbers = _found(catalog, removals, newest, track)
        stop = len(rows) if snapshot is None else int(np.searchsorted(rows, snapshot.rows))
        return cls(rows[:stop], numbers[:stop], removals)

    @property
    def id(self) -> str | None:
        """The hash of the removed rows; None where nothing is removed."""
        return blake2b(self.rows.tobytes(), digest_size=16).hexdigest() if len(self.rows) else None

    def keeps(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which rows are not removed: bool [n].

        Args:
            rows: a slice with start and stop, or int64 [n].
        """
        if isinstance(rows, slice):
            kept = np.ones(rows.stop - rows.start, np.bool_)
            first, last = np.searchsorted(self.rows, (rows.start, rows.stop))
            kept[self.rows[first:last] - rows.start] = False
            return kept
        return np.asarray(self.numbers_of(rows) == 0)

    def numbers_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The removal of each row: int64 [n], 0 where it isn't removed."""
        if not len(self.rows):
            return np.zeros(len(rows), np.int64)
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[at] == rows, self.numbers[at], 0)

    def removal_of(self, row: int) -> Removal | None:
        """The removal of a row; None where it isn't removed."""
        number = int(self.numbers_of(np.array([row]))[0])
        return self.removals[number - 1] if number else None


NOTHING_REMOVED = Removals(np.empty(0, np.int64), np.empty(0, np.int64), ())


def removals_folder(catalog: Catalog) -> Path:
    """Where a catalog's removals lie."""
    return catalog.folder / "removals"


def read_removals(catalog: Catalog) -> Iterator[Removal]:
    """The finished removals, by number."""
    for path in sorted(removals_folder(catalog).glob("??????.json")):
        yield Removal(**read_json(path))


class Names:
    """Keys and uids that are looked for, each on a line of its own."""

    def __init__(self, table: pa.Table) -> None:
        """Takes a table of STORED_SCHEMA."""
        self.table = table
        keys, uids, paths, ids = (table.column(name).combine_chunks() for name in STORED_SCHEMA.names)
        none = pa.scalar(None, pa.string())
        bare = pc.if_else(pc.is_null(paths), keys, none)
        elsewhere = pc.if_else(pc.is_null(ids), paths, none)
        self._values = (bare, uids, _pairs(ids.cast(pa.string()), keys), _pairs(elsewhere, keys))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @staticmethod
    def joined(tables: Iterable[pa.Table]) -> Names:
        """The lines of several tables, in order."""
        return Names(pa.concat_tables([STORED_SCHEMA.empty_table(), *tables]))

    @staticmethod
    def given(table: pa.Table, paths: pa.Array) -> Names:
        """What a user names (NAMES_SCHEMA), in a catalog whose shards have these paths, by id."""
        ids = pc.index_in(table.column("shard").combine_chunks(), value_set=paths, skip_nulls=True)
        return Names(table.append_column(STORED_SCHEMA.field("shard_id"), ids))

    def unknown_to(self, others: Names) -> Names:
        """The lines that neither `others` nor an earlier line has."""
        mine = np.arange(len(self))
        new = np.zeros(len(self), np.bool_)
        for values, theirs in zip(self._values, others._values, strict=True):
            there = pc.is_valid(values).to_numpy(zero_copy_only=False)
            first = _index(values, values)
            new |= there & (first == mine) & (_index(values, theirs) < 0)
        return Names(self.table.filter(pa.array(new)))

    def lines_of(self, samples: pa.Table, paths: pa.Array) -> list[npt.NDArray[np.int64]]:
        """Who is named.

        Args:
            samples: with shard, key and uid, n rows.
            paths: of the shards, by id.

        Returns:
            WAYS times int64 [n], by key, by uid, by shard's id and key, and by its path and key: the first line that names each sample,
            −1 where none does.
        """
        keys, uids, shards = (samples.column(name).combine_chunks() for name in ("key", "uid", "shard"))
        bare, named, by_id, by_path = self._values
        found = [_index(keys, bare), _index(uids, named)]
        for values, by in ((by_id, None), (by_path, paths)):
            if values.null_count == len(values):
                found.append(np.full(samples.num_rows, -1, np.int64))
            else:
                places = shards.cast(pa.string()) if by is None else by.take(shards)
                found.append(_index(_pairs(places, keys), values))
        return found

    def samples_of(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many samples each line names: int64 [lines], from how often it is among what `lines_of` gave, int64 [WAYS, lines]."""
        # Of lines that say the same in one respect (a uid in small letters and in capitals), the first has been counted.
        firsts = [_index(values, values) for values in self._values]
        ways = [np.where(first >= 0, count[first], 0) for first, count in zip(firsts, counts, strict=True)]
        return np.asarray(np.max(ways, axis=0))

    def texts(self, lines: npt.NDArray[np.int64]) -> list[str]:
        """Some lines as a person would write them."""
        rows = self.table.take(pa.array(lines)).to_pylist()
        return [" ".join(filter(None, (row["shard"], row["key"]))) or row["uid"].hex() for row in rows]


def _pairs(shards: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(shards, keys, "\n")  # no key holds a line break; null where either is


def _index(values: pa.Array, among: pa.Array) -> npt.NDArray[np.int64]:
    """Where each value first stands in `among`: int64 [n], −1 where it doesn't, or is null."""
    if among.null_count == len(among):
        return np.full(len(values), -1, np.int64)
    at = pc.index_in(values, value_set=among, skip_nulls=True)
    found: npt.NDArray[np.int64] = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


@dataclass
class Removing:
    """What a removal finds: nothing is written before `write`.

    Attributes:
        catalog: of the samples.
        names: the lines that no earlier removal has.
        repeated: lines that an earlier line has.
        known: other lines that an earlier removal has.
        rows: int64, ascending: all samples that they name.
        samples: int64 [lines], how many each of them names.
        before: what had been removed.
    """

    catalog: Catalog
    names: Names
    repeated: int
    known: int
    rows: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    before: Removals
    _snapshot: Snapshot = field(repr=False)

    @classmethod
    def find(cls, catalog: Catalog, table: pa.Table, track: Track = silent) -> Removing:
        """Looks for keys and uids in the newest snapshot.

        Args:
            catalog: of the samples.
            table: NAMES_SCHEMA.
            track: shows progress.
        """
        snapshot = catalog.snapshot()
        before = Removals.of(catalog, track=track)
        given = Names.given(table, catalog.shards(snapshot).column("path").combine_chunks()).unknown_to(
            Names.joined([])
        )
        names = given.unknown_to(Names.joined(_tables(catalog, before.removals)))
        parts = catalog.parts(snapshot) if len(names) else []
        rows = [np.empty(0, np.int64)]
        counts = np.zeros((WAYS, len(names)), np.int64)
        for part, hits in _look(catalog, snapshot, [(part, names) for part in parts], track):
            rows.append(part.first_row + np.flatnonzero(_first(hits) != NOBODY))
            for count, lines in zip(counts, hits, strict=True):
                np.add.at(count, lines[lines >= 0], 1)
        samples = names.samples_of(counts)
        repeated, known = table.num_rows - len(given), len(given) - len(names)
        return cls(catalog, names, repeated, known, np.concatenate(rows), samples, before, snapshot)

    @property
    def new(self) -> npt.NDArray[np.int64]:
        """The named rows that had not been removed before: int64, ascending."""
        return np.asarray(self.rows[self.before.keeps(self.rows)])

    def write(self, reason: str) -> Removal:
        """Makes it a removal of the catalog; from then on its samples are removed. Nobody else may be removing."""
        number = len(self.before.removals) + 1
        path = removals_folder(self.catalog) / f"{number:06d}.parquet"
        write_table(path, self.names.table)
        date = datetime.now(timezone.utc).date().isoformat()
        removal = Removal(number, reason, date, len(self.names), file_digest(path))
        write_json(path.with_suffix(".json"), removal.__dict__)
        rows = np.concatenate([self.before.rows, self.new])
        numbers = np.concatenate([self.before.numbers, np.full(len(self.new), number, np.int64)])
        order = np.argsort(rows)
        with suppress(OSError), _finding(self.catalog):
            _keep(self.catalog, number, self._snapshot.number, np.stack([rows[order], numbers[order]]))
        return removal


def _first(hits: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The first line that names each sample in any way; NOBODY where none does."""
    first: npt.NDArray[np.int64] = np.min([np.where(lines < 0, NOBODY, lines) for lines in hits], axis=0)
    return first


def _tables(catalog: Catalog, removals: Iterable[Removal]) -> Iterator[pa.Table]:
    for removal in removals:
        yield read_table(removals_folder(catalog) / f"{removal.number:06d}.parquet")


def _look(
    catalog: Catalog, snapshot: Snapshot, wanted: list[tuple[Part, Names]], track: Track
) -> Iterator[tuple[Part, list[npt.NDArray[np.int64]]]]:
    """The parts in which somebody is named, and by which lines."""
    paths = catalog.shards(snapshot).column("path").combine_chunks()
    for part, names in track(wanted, "looking for removed ones", len(wanted)):
        hits = names.lines_of(catalog.samples(part, ["shard", "key", "uid"]), paths)
        if any((lines >= 0).any() for lines in hits):
            yield part, hits


# --- what was found, kept for the next reader ---------------------------------------------------------------------------


def _found_folder(catalog: Catalog) -> Path:
    return removals_folder(catalog) / "found"


def _found(
    catalog: Catalog, removals: tuple[Removal, ...], newest: Snapshot, track: Track
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The removed rows of the newest snapshot, and the removal of each."""
    wanted = (len(removals), newest.number)
    known = _kept(catalog, wanted)
    if known[0] == wanted:
        return known[1][0], known[1][1]
    try:
        with _finding(catalog):
            known = _kept(catalog, wanted)  # another process may have looked meanwhile
            if known[0] != wanted:
                known = wanted, _completed(catalog, removals, newest, known, track)
                _keep(catalog, *wanted, known[1])
    except OSError:
        known = wanted, _completed(catalog, removals, newest, known, track)
    return known[1][0], known[1][1]


def _finding(catalog: Catalog) -> AbstractContextManager[None]:
    """Held by whoever writes what was found."""
    return locked(removals_folder(catalog) / ".found.lock", str(_found_folder(catalog)), wait=True)


Kept = tuple[tuple[int, int], npt.NDArray[np.int64]]


def _kept(catalog: Catalog, wanted: tuple[int, int]) -> Kept:
    """The latest that is kept, of so many removals and up to this snapshot, at most; of none, where nothing is."""
    there = [tuple(map(int, path.stem.split("-"))) for path in _found_folder(catalog).glob("??????-??????.json")]
    for removals, snapshot in sorted(there, reverse=True):
        if removals <= wanted[0] and snapshot <= wanted[1]:
            with suppress(
                OSError, ValueError, EOFError, KeyError
            ):  # a later one has taken its place meanwhile, or it is damaged
                path = _found_path(catalog, removals, snapshot)
                if file_digest(path) == read_json(path.with_suffix(".json"))["digest"]:
                    return (removals, snapshot), np.array(read_array(path))
    return (0, 0), np.empty((2, 0), np.int64)


def _found_path(catalog: Catalog, removals: int, snapshot: int) -> Path:
    return _found_folder(catalog) / f"{removals:06d}-{snapshot:06d}.npy"


def _keep(catalog: Catalog, removals: int, snapshot: int, found: npt.NDArray[np.int64]) -> None:
    """Writes rows and their removals, int64 [2, R], and lets go of what was kept before."""
    path = _found_path(catalog, removals, snapshot)
    write_array(path, found)
    write_json(path.with_suffix(".json"), {"digest": file_digest(path)})
    for other in path.parent.glob("??????-??????.json"):
        numbers = tuple(map(int, other.stem.split("-")))
        if other != path.with_suffix(".json") and numbers[0] <= removals and numbers[1] <= snapshot:
            other.unlink(missing_ok=True)
            other.with_suffix(".npy").unlink(missing_ok=True)


def _completed(
    catalog: Catalog, removals: tuple[Removal, ...], newest: Snapshot, known: Kept, track: Track
) -> npt.NDArray[np.int64]:
    """What is known, and what the removals since then, or all of them in new parts, name."""
    (count, snapshot), found = known
    old_parts = catalog.snapshot(snapshot).parts if snapshot else 0
    tables = list(_tables(catalog, removals))
    everything, later = Names.joined(tables), Names.joined(tables[count:])
    ends = np.cumsum([removal.names for removal in removals])
    skipped = len(everything) - len(later)
    parts = catalog.parts(newest)
    wanted = [(part, later if part.number < old_parts else everything) for part in parts]
    pieces = [found]
    for part, hits in _look(catalog, newest, [(part, names) for part, names in wanted if len(names)], track):
        first = _first(hits)
        rows = np.flatnonzero(first != NOBODY)
        lines = first[rows] + (skipped if part.number < old_parts else 0)
        rows = part.first_row + rows
        new = ~np.isin(rows, found[0])
        pieces.append(np.stack([rows, np.searchsorted(ends, lines, side="right") + 1])[:, new])
    joined = np.concatenate(pieces, axis=1)
    return joined[:, np.argsort(joined[0])]
