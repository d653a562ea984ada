"""Removals: tombstones. A removal names keys, uids, urls or hashes, and holds for every sample that has one, now or imported later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.files import (
    check_file,
    digest,
    known_digest,
    map_cache,
    read_record,
    read_table,
    write_array,
    write_record,
    write_table,
)
from tailwise.catalog.noted import HASH_COLUMNS, HASH_TYPE, NOTED, noted_hashes
from tailwise.errors import UserError
from tailwise.progress import Track, silent
from tailwise.storage.local import locked

NAMES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("uid", pa.binary(16)),  # beside a key: the text may be either
        pa.field("shard", pa.string()),  # path or URL: the key is meant in this one only
        *(pa.field(name, pa.string()) for name in NOTED),
    ]
)
# As stored: with the id of the shard, where it was in the catalog by that path; paths may change (`relocate`), ids don't.
STORED_SCHEMA = NAMES_SCHEMA.append(pa.field("shard_id", pa.int32()))
NO_MATCH = np.iinfo(np.int64).max
NAME_KINDS = 4 + len(NOTED)  # key, uid, shard's id and key, shard's path and key, and those of NOTED
BY_KEY, BY_UID = 0, 1
REPLACED = "its file was replaced (import --update)"  # reason of a removal that is no user's


@dataclass(frozen=True)
class Removal:
    """One finished removal."""

    number: int  # 1, 2, …
    reason: str  # as given
    date: str  # day in UTC, as in ISO 8601; "" of replaced files
    names: int  # number of keys and uids
    digest: str  # hash of the file that lists them; "" of replaced files


@dataclass(frozen=True, eq=False)
class Removals:
    """All samples of a snapshot that were removed."""

    rows: npt.NDArray[np.int64]  # int64 [R], ascending
    numbers: npt.NDArray[np.int64]  # int64 [R], first removal of each row
    removals: tuple[Removal, ...]  # all of the catalog, by number; some may match no sample of the snapshot

    @classmethod
    def of(cls, catalog: Catalog, snapshot: Snapshot | None = None, track: Track = silent) -> Removals:
        """Return the removals of a snapshot, by default the newest; samples of files that were replaced since are removed, too.

        See `named`.
        """
        found = cls.named(catalog, snapshot, track)
        replaced = np.setdiff1d(catalog.replaced_rows(), found.rows, assume_unique=True)
        if not len(replaced):
            return found
        more = Removal(len(found.removals) + 1, REPLACED, "", 0, "")
        rows = np.concatenate([found.rows, replaced])
        numbers = np.concatenate([found.numbers, np.full(len(replaced), more.number)])
        order = np.argsort(rows)
        stop = len(rows) if snapshot is None else int(np.searchsorted(rows, snapshot.rows, sorter=order))
        return cls(rows[order[:stop]], numbers[order[:stop]], (*found.removals, more))

    @classmethod
    def named(cls, catalog: Catalog, snapshot: Snapshot | None = None, track: Track = silent) -> Removals:
        """Return the samples of a snapshot that users removed.

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

        `rows`: a slice with start and stop, or int64 [n].
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
    return catalog.folder / layout.REMOVALS


def names_path(catalog: Catalog, number: int) -> Path:
    """Return the file with the names of one removal: STORED_SCHEMA."""
    return layout.numbered(removals_folder(catalog), number, layout.TABLE)


@contextmanager
def removing_or_publishing(catalog: Catalog, *, exclusive: bool = False) -> Iterator[None]:
    """Held by exports while they check removals and publish, together, and by a removal while it is written, alone."""
    path = layout.lock(removals_folder(catalog) / layout.PUBLISHING)
    with ExitStack() as held:
        with suppress(*(() if exclusive else (OSError,))):  # no process can remove from a read-only catalog
            held.enter_context(locked(path, str(path), wait=True, shared=not exclusive))
        yield


def read_removals(catalog: Catalog) -> Iterator[Removal]:
    """The finished removals, by number.

    Raises:
        UserError: a file of the series is missing or damaged.
    """
    for entry in catalog.series(layout.REMOVALS).known():
        removal = Removal(**entry)
        check_file(names_path(catalog, removal.number))
        yield removal


class Names:
    """Keys and uids that are looked for, each on a line of its own."""

    def __init__(self, table: pa.Table) -> None:
        """Take a table of STORED_SCHEMA; older ones have fewer columns."""
        self.table = table = _whole(table)
        names = ("key", "uid", "shard", "shard_id")
        keys, uids, paths, ids = (table.column(name).combine_chunks() for name in names)
        self.noted = tuple(name for name in NOTED if table.column(name).null_count < len(table))
        hashes = (noted_hashes(name, table.column(name).combine_chunks()) for name in NOTED)
        none = pa.scalar(None, pa.string())
        bare = pc.if_else(pc.is_null(paths), keys, none)
        elsewhere = pc.if_else(pc.is_null(ids), paths, none)
        self._values = (bare, uids, _pairs(ids.cast(pa.string()), keys), _pairs(elsewhere, keys), *hashes)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @staticmethod
    def joined(tables: Iterable[pa.Table]) -> Names:
        """The lines of several tables, in order."""
        return Names(pa.concat_tables([STORED_SCHEMA.empty_table(), *map(_whole, tables)]))

    @staticmethod
    def given(table: pa.Table, paths: pa.Array, first_states: npt.NDArray[np.int32] | None = None) -> Names:
        """Return the names that a user gives (NAMES_SCHEMA), in a catalog whose shards have these paths, and first states, by id."""
        ids = pc.index_in(table.column("shard").combine_chunks(), value_set=paths, skip_nulls=True)
        ids = ids if first_states is None else pa.array(first_states).take(ids)
        return Names(table.append_column(STORED_SCHEMA.field("shard_id"), ids))

    def unknown_to(self, others: Names) -> Names:
        """The lines that neither `others` nor an earlier line has."""
        return Names(self.table.filter(pa.array(self.unknown(others))))

    def unknown(self, others: Names) -> npt.NDArray[np.bool_]:
        """Which lines neither `others` nor an earlier line has: bool [lines]."""
        mine = np.arange(len(self))
        new = np.zeros(len(self), np.bool_)
        for values, theirs in zip(self._values, others._values, strict=True):
            there = pc.is_valid(values).to_numpy(zero_copy_only=False)
            first = _index(values, values)
            new |= there & (first == mine) & (_index(values, theirs) < 0)
        return new

    def without_uids(self, lines: npt.NDArray[np.int64]) -> Names:
        """The same lines, of which some name samples by key alone."""
        uids = self.table.column("uid").combine_chunks()
        dropped = pc.is_in(uids, value_set=uids.take(pa.array(lines)), skip_nulls=True)
        kept = pc.if_else(dropped, pa.scalar(None, uids.type), uids)
        return Names(self.table.set_column(STORED_SCHEMA.get_field_index("uid"), STORED_SCHEMA.field("uid"), kept))

    def lines_of(
        self, samples: pa.Table, paths: pa.Array, first_states: npt.NDArray[np.int32] | None = None
    ) -> list[npt.NDArray[np.int64]]:
        """Who is named.

        Args:
            samples: with shard, key, uid, and hashes if there are any, n rows.
            paths: of the shards, by id.
            first_states: of the shards, by id (see `Catalog.first_states`); None where no file was replaced.

        Returns:
            int64 [n] for each of NAME_KINDS: the first line that names each sample, −1 if none does.
        """
        keys, uids, shards = (samples.column(name).combine_chunks() for name in ("key", "uid", "shard"))
        bare, named, by_id, by_path, *noted = self._values
        found = [_index(keys, bare), _index(uids, named)]
        for values, by in ((by_id, None), (by_path, paths)):
            if values.null_count == len(values):
                found.append(np.full(samples.num_rows, -1, np.int64))
            else:
                first = shards if first_states is None else pa.array(first_states).take(shards)
                places = first.cast(pa.string()) if by is None else by.take(shards)
                found.append(_index(_pairs(places, keys), values))
        for name, values in zip(NOTED, noted, strict=True):
            nothing = pa.nulls(len(keys), HASH_TYPE)
            there = HASH_COLUMNS[name] in samples.column_names and name in self.noted
            found.append(_index(samples.column(HASH_COLUMNS[name]).combine_chunks() if there else nothing, values))
        return found

    def samples_of(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many samples each line names: int64 [lines], from how often it is among what `lines_of` gave, int64 [NAME_KINDS, lines]."""
        # Of lines that say the same in one respect (a uid in small letters and in capitals), the first has been counted.
        firsts = [_index(values, values) for values in self._values]
        ways = [np.where(first >= 0, count[first], 0) for first, count in zip(firsts, counts, strict=True)]
        return np.asarray(np.max(ways, axis=0))

    def texts(self, lines: npt.NDArray[np.int64]) -> list[str]:
        """Some lines as a person would write them."""
        rows = self.table.take(pa.array(lines)).to_pylist()
        shown = (filter(None, (row[name] for name in ("shard", "key", *NOTED))) for row in rows)
        return [" ".join(texts) or row["uid"].hex() for row, texts in zip(rows, shown, strict=True)]


def _whole(table: pa.Table) -> pa.Table:
    """Return a table as of STORED_SCHEMA."""
    missing = [item for item in STORED_SCHEMA if item.name not in table.column_names]
    for item in missing:
        table = table.append_column(item, pa.nulls(len(table), item.type))
    return table.select(STORED_SCHEMA.names)


def _pairs(shards: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(shards, keys, "\0")  # no path and no number holds it; null where either is


def _index(values: pa.Array, among: pa.Array) -> npt.NDArray[np.int64]:
    """Where each value first stands in `among`: int64 [n], −1 where it doesn't, or is null."""
    if among.null_count == len(among):
        return np.full(len(values), -1, np.int64)
    at = pc.index_in(values, value_set=among, skip_nulls=True)
    found: npt.NDArray[np.int64] = pc.fill_null(at, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


@dataclass
class Removing:
    """Rows that a removal finds; `write` writes them."""

    catalog: Catalog
    names: Names  # the lines that no earlier removal has
    repeated: int  # lines that an earlier line has
    known: int  # other lines that an earlier removal has
    rows: npt.NDArray[np.int64]  # int64, ascending: all samples that they name
    samples: npt.NDArray[np.int64]  # int64 [lines], how many each of them names
    ambiguous: list[str]  # lines whose text is the key of one sample and the uid of another; they are keys
    before: Removals  # what had been removed
    _snapshot: Snapshot = field(repr=False)

    @classmethod
    def find(cls, catalog: Catalog, table: pa.Table, track: Track = silent) -> Removing:
        """Look for names in the newest snapshot.

        `table`: NAMES_SCHEMA.
        """
        snapshot = catalog.snapshot()
        before = Removals.named(catalog, track=track)
        paths = catalog.shards(snapshot).column("path").combine_chunks()
        given = Names.given(table, paths, catalog.first_states())
        given = given.unknown_to(Names.joined([]))
        earlier = Names.joined(_tables(catalog, before.removals))
        names = given.unknown_to(earlier)
        parts = catalog.parts(snapshot) if len(names) else []
        rows, by_uid = [np.empty(0, np.int64)], [np.empty((2, 0), np.int64)]  # of by_uid: rows and lines
        counts = np.zeros((NAME_KINDS, len(names)), np.int64)
        for part, hits in _look(catalog, snapshot, [(part, names) for part in parts], track):
            named = np.flatnonzero(_first(hits) != NO_MATCH)
            rows.append(part.first_row + named)
            only_uid = named[np.all([hits[way][named] < 0 for way in range(NAME_KINDS) if way != BY_UID], axis=0)]
            by_uid.append(np.stack([part.first_row + only_uid, hits[BY_UID][only_uid]]))
            for count, lines in zip(counts, hits, strict=True):
                np.add.at(count, lines[lines >= 0], 1)
        others, lines = np.concatenate(by_uid, axis=1)
        two_meanings = counts[BY_KEY][lines] > 0
        ambiguous = np.unique(lines[two_meanings])
        counts[BY_UID][ambiguous] = 0
        plain, samples = names.without_uids(ambiguous), names.samples_of(counts)
        fresh = plain.unknown(earlier)
        texts = names.texts(ambiguous)
        names = Names(plain.table.filter(pa.array(fresh)))
        repeated, known = table.num_rows - len(given), len(given) - len(names)
        found = np.setdiff1d(np.concatenate(rows), others[two_meanings], assume_unique=True)
        return cls(catalog, names, repeated, known, found, samples[fresh], texts, before, snapshot)

    @property
    def new(self) -> npt.NDArray[np.int64]:
        """The named rows that had not been removed before: int64, ascending."""
        return np.asarray(self.rows[self.before.keeps(self.rows)])

    def write(self, reason: str) -> Removal:
        """Write the removal to the catalog; from then on its samples are removed. No other process may be removing."""
        number = len(self.before.removals) + 1
        path = names_path(self.catalog, number)
        write_table(path, self.names.table)
        date = datetime.now(timezone.utc).date().isoformat()
        removal = Removal(number, reason, date, len(self.names), known_digest(path))
        with removing_or_publishing(self.catalog, exclusive=True):
            self.catalog.series(layout.REMOVALS).append(asdict(removal))
        rows = np.concatenate([self.before.rows, self.new])
        numbers = np.concatenate([self.before.numbers, np.full(len(self.new), number, np.int64)])
        order = np.argsort(rows)
        with suppress(OSError), _finding(self.catalog):
            kept = np.stack([rows[order], numbers[order]])
            _keep(self.catalog, (*self.before.removals, removal), self._snapshot, kept)
        return removal


def _first(hits: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the first line that names each sample in any way; NO_MATCH if none does."""
    first: npt.NDArray[np.int64] = np.min([np.where(lines < 0, NO_MATCH, lines) for lines in hits], axis=0)
    return first


def _tables(catalog: Catalog, removals: Iterable[Removal]) -> Iterator[pa.Table]:
    for removal in removals:
        yield read_table(names_path(catalog, removal.number))


def _look(
    catalog: Catalog, snapshot: Snapshot, wanted: list[tuple[Part, Names]], track: Track
) -> Iterator[tuple[Part, list[npt.NDArray[np.int64]]]]:
    """The parts in which somebody is named, and by which lines."""
    paths = catalog.shards(snapshot).column("path").combine_chunks()
    first_states, replaced = catalog.first_states(), list(catalog.replaced())
    for part, names in track(wanted, "looking for removed ones", len(wanted)):
        hashes = [HASH_COLUMNS[name] for name in names.noted]
        there = pq.read_schema(catalog.samples_path(part.number)).names if hashes else []
        samples = catalog.samples(part, ["shard", "key", "uid", *(name for name in hashes if name in there)])
        hits = names.lines_of(samples, paths, first_states)
        for lines in hits:
            lines[np.isin(samples.column("shard").to_numpy(), replaced)] = -1  # they are removed already
        if any((lines >= 0).any() for lines in hits):
            yield part, hits


# --- what was found, kept for the next reader ---------------------------------------------------------------------------


def found_markers(catalog: Catalog) -> list[Path]:
    """Return the markers of the removed rows that are kept, sorted."""
    return sorted(_found_folder(catalog).glob(f"??????-??????{layout.RECORD}"))


def _found_folder(catalog: Catalog) -> Path:
    return removals_folder(catalog) / layout.FOUND


def _found(
    catalog: Catalog, removals: tuple[Removal, ...], newest: Snapshot, track: Track
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The removed rows of the newest snapshot, and the removal of each."""
    wanted = (len(removals), newest.number)
    known = _kept(catalog, removals, newest)
    if known[0] == wanted:
        return known[1][0], known[1][1]
    try:
        with _finding(catalog):
            known = _kept(catalog, removals, newest)  # another process may have looked meanwhile
            if known[0] != wanted:
                known = wanted, _completed(catalog, removals, newest, known, track)
                _keep(catalog, removals, newest, known[1])
    except OSError:
        known = wanted, _completed(catalog, removals, newest, known, track)
    return known[1][0], known[1][1]


def _finding(catalog: Catalog) -> AbstractContextManager[None]:
    """Return the lock that a process holds while it writes found rows."""
    return locked(layout.lock(_found_folder(catalog)), str(_found_folder(catalog)), wait=True)


Kept = tuple[tuple[int, int], npt.NDArray[np.int64]]


def _kept(catalog: Catalog, removals: tuple[Removal, ...], newest: Snapshot) -> Kept:
    """Return the newest usable cache of found rows, up to these removals and this snapshot; an empty one if there is none."""
    for count, snapshot in _numbers_kept(catalog):
        if count <= len(removals) and snapshot <= newest.number:
            path = _found_path(catalog, count, snapshot)
            # Passed over: a file that another process has replaced, or that is damaged, or of another state of the catalog.
            with suppress(OSError, UserError, LookupError):
                made_from = _made_from(removals[:count], catalog.snapshot(snapshot))
                if read_record(layout.marker(path))["made_from"] == made_from:
                    found = map_cache(path)
                    if found is not None:
                        return (count, snapshot), np.array(found)
    return (0, 0), np.empty((2, 0), np.int64)


def _numbers_kept(catalog: Catalog) -> list[tuple[int, int]]:
    """Numbers of removals and snapshots of all that is kept, the latest first."""
    stems = (path.stem for path in found_markers(catalog))
    return sorted(((int(stem[:6]), int(stem[7:])) for stem in stems if stem.replace("-", "").isdigit()), reverse=True)


def _found_path(catalog: Catalog, removals: int, snapshot: int) -> Path:
    return _found_folder(catalog) / f"{removals:06d}-{snapshot:06d}{layout.ARRAY}"


def _made_from(removals: tuple[Removal, ...], snapshot: Snapshot) -> str:
    return digest([[asdict(removal) for removal in removals], snapshot.id])


def _keep(catalog: Catalog, removals: tuple[Removal, ...], snapshot: Snapshot, found: npt.NDArray[np.int64]) -> None:
    """Writes rows and their removals, int64 [2, R], and lets go of what was kept before."""
    path = _found_path(catalog, len(removals), snapshot.number)
    write_array(path, found)
    made_from = _made_from(removals, snapshot)
    write_record(layout.marker(path), {"digest": known_digest(path), "made_from": made_from})
    for count, number in _numbers_kept(catalog):
        if (count, number) != (len(removals), snapshot.number) and count <= len(removals) and number <= snapshot.number:
            other = _found_path(catalog, count, number)
            layout.marker(other).unlink(missing_ok=True)
            other.unlink(missing_ok=True)


def _completed(
    catalog: Catalog, removals: tuple[Removal, ...], newest: Snapshot, known: Kept, track: Track
) -> npt.NDArray[np.int64]:
    """Return the known rows and those that later removals name; in new parts, those that any removal names."""
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
        rows = np.flatnonzero(first != NO_MATCH)
        lines = first[rows] + (skipped if part.number < old_parts else 0)
        rows = part.first_row + rows
        new = ~np.isin(rows, found[0])
        pieces.append(np.stack([rows, np.searchsorted(ends, lines, side="right") + 1])[:, new])
    joined = np.concatenate(pieces, axis=1)
    return joined[:, np.argsort(joined[0])]
