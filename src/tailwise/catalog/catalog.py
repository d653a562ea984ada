"""The one table of samples: shards, parts, columns and snapshots in a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.files import (
    FileStamp,
    check_file,
    checked_record,
    digest,
    file_stamp,
    known_record,
    map_array,
    read_json,
    read_table,
    reading,
    record_bytes,
    write_table,
)
from tailwise.catalog.kinds import CLUSTERING, DROP_LIST, KINDS, PLAN
from tailwise.catalog.schema import PARQUET, REPLACES, SHARD_SCHEMA
from tailwise.catalog.series import Series
from tailwise.errors import ConflictError, DamagedError, NotFoundError, UnsupportedError, UserError
from tailwise.notebook import shown
from tailwise.storage.local import TEMPORARY_SUFFIX, locked, put_if_absent
from tailwise.storage.store_path import is_settled, looked_up, path_of, settle
from tailwise.text import command_line

FORMAT = 2
SERIES = (layout.SNAPSHOTS, layout.REMOVALS)
REPLACED_BY = " (replaced by shard "  # in the path of a shard whose file was replaced
CONTENT = b"tailwise.content"  # in shards.parquet: the hash of its rows


@dataclass(frozen=True)
class Snapshot:
    """A numbered, immutable list of shards: the first `shards` shards of the catalog, in its first `parts` parts."""

    number: int  # 1, 2, …
    shards: int
    parts: int
    rows: int  # samples
    id: str  # hash of all shards' contents as indexed; paths play no role


@dataclass(frozen=True)
class Part:
    """Consecutive shards, about a million rows: the unit of file, of work and of retry."""

    number: int  # 0, 1, …
    first_row: int  # of the catalog
    rows: int

    def __str__(self) -> str:
        """Return the name, as errors show it."""
        return self.name

    @property
    def name(self) -> str:
        """The stem of its files."""
        return layout.part_name(self.number)

    @property
    def span(self) -> slice:
        """Its rows in the catalog."""
        return slice(self.first_row, self.first_row + self.rows)


RowGroup = tuple[Path, int]  # file of a part's samples, and number of the row group in it


class Catalog:
    """A folder with one table of samples. Row order is fixed at import; steps add columns."""

    def __init__(self, folder: Path) -> None:
        """Use `Catalog.open` or `Catalog.create`."""
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path | Catalog) -> Catalog:
        """Opens a catalog; one that is open already is returned as it is.

        Raises:
            UserError: there is none, or it is of another format.
        """
        if isinstance(folder, Catalog):
            return folder
        path = path_of(folder)
        header = path / layout.HEADER
        if is_settled(header):
            return cls(path)
        if not header.exists():
            raise NotFoundError(
                f"{path} is no catalog (no {layout.HEADER}): make one with `tailwise import SOURCE… {path}`"
            )
        found = read_json(header)
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise UnsupportedError(
                f"{path} has catalog format {found.get('format')}, this tailwise reads {FORMAT}: import the pool into a new catalog"
            )
        checked_record(header, found)
        settle(header)
        return cls(path)

    @classmethod
    def create(cls, folder: str | Path) -> Catalog:
        """Opens a catalog, or makes an empty one.

        Raises:
            UserError: the folder holds something else.
        """
        path = path_of(folder)
        if not (path / layout.HEADER).exists():
            there = path.is_dir()
            if any(not _is_ours(item) for item in path.iterdir()) if there else path.exists():
                raise ConflictError(f"{path} exists and is no catalog: name a new or an empty folder")
            for name in SERIES:
                Series(path / name).begin()
            put_if_absent(path / layout.HEADER, record_bytes({"format": FORMAT}))  # or another process has
        return cls.open(path)

    def _repr_html_(self) -> str:
        newest = self.snapshots()[-1:]
        facts: dict[str, object] = {"samples": newest[0].rows, "shards": newest[0].shards} if newest else {"samples": 0}
        columns = sorted(path.parent.name for path in (self.folder / layout.EMBEDDINGS).glob(f"*/{layout.COLUMN}"))
        facts |= {"embeddings": ", ".join(columns)}
        facts |= {kind.section: ", ".join(kind.finished(self.folder)) for kind in KINDS if kind.made_by}
        return shown(f"catalog {self.folder}", facts)

    def series(self, name: str) -> Series:
        """A numbered series of the catalog: one of SERIES."""
        return Series(self.folder / name)

    # --- shards and snapshots ---------------------------------------------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first.

        Raises:
            UserError: one is missing or damaged.
        """
        return [Snapshot(**entry) for entry in self.series(layout.SNAPSHOTS).known()]

    def snapshot(self, number: int | None = None) -> Snapshot:
        """One snapshot, the newest by default.

        Raises:
            UserError: there is no such snapshot.
        """
        snapshots = self.snapshots()
        if not snapshots:
            raise UserError(f"{self.folder} holds no samples: run `tailwise import SOURCE… {self.folder}`")
        if number is None:
            return snapshots[-1]
        if not 1 <= number <= len(snapshots):
            raise UserError(f"snapshot {number} is not among 1 … {len(snapshots)} of {self.folder}")
        return snapshots[number - 1]

    def shards(self, snapshot: Snapshot | None = None) -> pa.Table:
        """The table of shards (schema.SHARD_SCHEMA), one row a shard, in id order; all known ones without a snapshot.

        A shard whose file was replaced since has a path that names no file: "PATH (replaced by shard ID)".
        """
        stored = self._all_stored()
        table, replaced = self._of_snapshot(stored, snapshot), self._replaced(stored)
        if not replaced:
            return table
        paths = [
            f"{path}{REPLACED_BY}{replaced[shard]})" if shard in replaced else path
            for shard, path in enumerate(table["path"].to_pylist())
        ]
        return table.set_column(table.schema.get_field_index("path"), SHARD_SCHEMA.field("path"), [paths])

    def replaced(self, snapshot: Snapshot | None = None) -> dict[int, int]:
        """Return the shards whose files were replaced since they were imported: id → id of the shard that took the place.

        Of a snapshot, those whose new state is in it, too.
        """
        return self._replaced(self._all_stored(), snapshot)

    def _replaced(self, stored: pa.Table, snapshot: Snapshot | None = None) -> dict[int, int]:
        if stored[REPLACES].null_count == len(stored):
            return {}
        table = self._of_snapshot(stored, snapshot)
        table = table.filter(table[REPLACES].is_valid())
        old = pc.struct_field(table[REPLACES], "shard").to_pylist()
        return dict(zip(old, table["shard"].to_pylist(), strict=True))

    def first_states(self) -> npt.NDArray[np.int32]:
        """Return the shard that held the first state of each shard's file, int32 [shards]: names and hashed uids stay those of this one."""
        first = np.arange(len(self._stored_shards()), dtype=np.int32)
        for old, new in sorted(self.replaced().items(), key=itemgetter(1)):
            first[new] = first[old]
        return first

    def replaced_rows(self, snapshot: Snapshot | None = None) -> npt.NDArray[np.int64]:
        """Return the rows of replaced shards (see `replaced`), ascending: int64."""
        if not (replaced := self.replaced(snapshot)):
            return np.empty(0, np.int64)
        rows = self._stored_shards()["rows"].to_numpy()
        ends = np.cumsum(rows)
        return np.concatenate([np.arange(ends[shard] - rows[shard], ends[shard]) for shard in sorted(replaced)])

    def _all_stored(self) -> pa.Table:
        with suppress(FileNotFoundError):
            return _shards(file_stamp(self.folder / layout.SHARDS))
        return SHARD_SCHEMA.empty_table()

    def _stored_shards(self) -> pa.Table:
        return self._of_snapshot(self._all_stored())

    def _of_snapshot(self, table: pa.Table, snapshot: Snapshot | None = None) -> pa.Table:
        path = self.folder / layout.SHARDS
        if snapshot is None:
            snapshots = self.snapshots()
            snapshot = snapshots[-1] if snapshots else None
        wanted = snapshot.shards if snapshot else 0
        if table.num_rows < wanted:
            raise DamagedError(
                f"{path} is missing or damaged: it has {table.num_rows:,} of {wanted:,} shards; restore it"
            )
        return table.slice(0, wanted)

    def append_snapshot(self, new: pa.Table, parts: int) -> Snapshot:
        """Make the shards of the newest snapshot and new ones (SHARD_SCHEMA) the next snapshot; their parts must lie on disk already."""
        shards = pa.concat_tables([self._stored_shards(), new])
        number = len(self.snapshots()) + 1
        contents = [shards.column(name).to_pylist() for name in ("shard", "rows", "index_checksum")]
        rows = sum(shards.column("rows").to_pylist())
        snapshot = Snapshot(number, shards.num_rows, parts, rows, digest(contents))
        self._write_shards(shards)
        self.series(layout.SNAPSHOTS).append(asdict(snapshot))
        self._forget_parts_from(parts)
        return snapshot

    def _write_shards(self, shards: pa.Table) -> None:
        idle = [name for name in (PARQUET, REPLACES) if shards[name].null_count == len(shards)]
        shards = shards.drop_columns(idle)  # each byte of the file is content, so that a damaged one is noticed
        write_table(self.folder / layout.SHARDS, shards.replace_schema_metadata({CONTENT: _content(shards)}))

    def _forget_parts_from(self, number: int) -> None:
        """Removes what an abandoned import left behind the last part."""
        while (marker := layout.marker(self.samples_path(number))).exists():
            marker.unlink()
            self.samples_path(number).unlink(missing_ok=True)
            number += 1

    def relocate(self, old: str, new: str, check: Callable[[pa.Table], None] | None = None) -> int:
        """Replaces the leading folders `old` of the shards' paths by `new`; returns how many paths changed: 0 when that is done already.

        Args:
            old: leading part of paths.
            new: takes its place.
            check: takes the moved shards (schema.SHARD_SCHEMA), and refuses them if they are not there.

        Raises:
            UserError: no path begins with `old` or `new`, two shards would become one file, or another process is writing the catalog.
        """
        old, new = old.rstrip("/"), new.rstrip("/")
        with locked(self.folder / layout.LOCK, str(self.folder)):
            table = self._stored_shards()
            paths: list[str] = table.column("path").to_pylist()
            moved = [new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path for path in paths]
            changed = [before != after for before, after in zip(paths, moved, strict=True)]
            if not any(changed):
                if any(path == new or path.startswith(f"{new}/") for path in paths):
                    return 0  # a command that was interrupted after it had written is repeated
                example = paths[0] if paths else "none"
                raise UserError(f"no shard's path begins with {old!r} (the first is {example!r})")
            replaced = self.replaced()
            there = pa.array([shard not in replaced for shard in range(len(table))], pa.bool_())
            _refuse_shared_paths(pa.array(moved, pa.string()).filter(there).to_pylist())
            index = table.schema.get_field_index("path")
            table = table.set_column(index, SHARD_SCHEMA.field("path"), [moved])
            if check is not None:
                check(table.filter(pc.and_(pa.array(changed), there)))
            self._write_shards(table)
        return sum(changed)

    def replace_shards(self, changed: pa.Table) -> None:
        """Write other rows for some shards (SHARD_SCHEMA), of the same samples in the same places.

        A UserError if two shards would become one file, or another process is writing the catalog.
        """
        with locked(self.folder / layout.LOCK, str(self.folder)):
            rows, replaced = self._stored_shards().to_pylist(), self.replaced()
            for row in changed.to_pylist():
                rows[row["shard"]] = row
            _refuse_shared_paths([row["path"] for row in rows if row["shard"] not in replaced])
            self._write_shards(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))

    # --- columns ----------------------------------------------------------------------------------------------------

    def parts(self, snapshot: Snapshot | None = None) -> list[Part]:
        """The parts of a snapshot (the newest by default), in row order."""
        snapshot = snapshot or self.snapshot()
        shards = self.shards(snapshot)
        rows = np.zeros(snapshot.parts, np.int64)
        np.add.at(rows, shards.column("part").to_numpy(), shards.column("rows").to_numpy())
        first = np.concatenate([[0], np.cumsum(rows)])
        return [Part(number, int(first[number]), int(rows[number])) for number in range(snapshot.parts)]

    def samples_path(self, part: int) -> Path:
        """The Parquet file with the samples of one part."""
        return self.folder / layout.SAMPLES / f"{layout.part_name(part)}{layout.TABLE}"

    def samples_markers(self) -> list[Path]:
        """Return the markers of the samples of all parts, sorted; those of an unfinished import are among them."""
        return sorted((self.folder / layout.SAMPLES).glob(f"{layout.PART}*{layout.RECORD}"))

    def samples(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """The samples of one part, in row order."""
        return read_table(self.samples_path(part.number), columns)

    def row_groups(self, parts: Sequence[Part]) -> list[RowGroup]:
        """Return the row groups of the samples of some parts: units of work that are smaller than a part."""
        paths = [check_file(self.samples_path(part.number)) for part in parts]
        return [(path, number) for path in paths for number in range(pq.ParquetFile(path).num_row_groups)]

    def samples_at(self, part: int, rows: npt.NDArray[np.int64], columns: Sequence[str] | None = None) -> pa.Table:
        """Return some samples of a part, read from those of its row groups that hold them.

        Args:
            part: its number.
            rows: int64 [n], counted from the first row of the part.
            columns: of the samples; None for all.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.samples_path(part)
        with reading(path) as checked, pq.ParquetFile(checked) as file:
            sizes = np.array([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
            ends = np.cumsum(sizes)
            wanted, at = np.unique(np.searchsorted(ends, rows, "right"), return_inverse=True)
            table = file.read_row_groups(wanted.tolist(), columns=columns, use_threads=False)
            skipped = ends[wanted] - np.cumsum(sizes[wanted])  # rows before each group that are not read
            return table.take(pa.array(rows - skipped[at]))

    def embedding_folder(self, column: str) -> Path:
        """Return the folder of an embedding column ("image" or "text")."""
        return self.folder / layout.EMBEDDINGS / column

    def embedding_path(self, column: str, part: Part) -> Path:
        """Return the file of one part of an embedding column; the part is complete once its marker exists."""
        return self.embedding_folder(column) / f"{part.name}{layout.ARRAY}"

    def embedding(self, column: str, part: Part) -> npt.NDArray[np.float16]:
        """One part of an embedding column, mapped: float16 [rows, d], unit-norm rows; a row of zeros has no embedding."""
        return map_array(self.embedding_path(column, part))

    def require_embeddings(self, column: str, snapshot: Snapshot) -> None:
        """Check that an embedding column reaches to the end of a snapshot.

        Raises:
            UserError: the column is absent, or doesn't reach to the end of the snapshot.
        """
        parts = self.parts(snapshot)
        markers = looked_up([layout.marker(self.embedding_path(column, part)) for part in parts])
        missing = [part for part, marker in zip(parts, markers, strict=True) if not marker.exists()]
        if missing:
            rows = sum(part.rows for part in missing)
            import_them = command_line("import", "EMBEDDINGS", self.folder)
            make_them = command_line("embed", self.folder, encoder="…", column=None if column == "image" else column)
            raise UserError(
                f"{rows:,} of {snapshot.rows:,} samples have no {column} embeddings in {self.folder}: import them "
                f"({import_them}) or make them ({make_them})"
            )

    def embedding_parts(self, column: str, snapshot: Snapshot) -> list[npt.NDArray[np.float16]]:
        """Return all parts of an embedding column, mapped.

        Raises:
            UserError: the column is absent, or doesn't reach to the end of the snapshot.
        """
        self.require_embeddings(column, snapshot)
        with ThreadPoolExecutor() as pool:  # each part is hashed once
            return list(pool.map(lambda part: self.embedding(column, part), self.parts(snapshot)))

    def embedding_id(self, column: str, snapshot: Snapshot) -> str:
        """The hash of an embedding column over a snapshot."""
        markers = [layout.marker(self.embedding_path(column, part)) for part in self.parts(snapshot)]
        return digest([known_record(marker)["digest"] for marker in looked_up(markers)])

    def rejected_logs(self, first: str = "") -> list[Path]:
        """Return the logs of rejected samples, sorted: all of them, or those whose names start with `first`."""
        return sorted((self.folder / layout.REJECTED).glob(f"{first}*{layout.TABLE}"))

    def rejected(
        self, columns: Sequence[str] | None = None, where: pc.Expression | None = None, first: str = ""
    ) -> pa.Table | None:
        """Return rejected samples and reasons (schema.REJECTED_SCHEMA), all of them or a selection; None without a log."""
        files = [os.fspath(path) for path in self.rejected_logs(first)]
        # Without `partitioning`, a catalog in a folder "shard=1" would have another column.
        return pq.ParquetDataset(files, filters=where, partitioning=None).read(columns) if files else None

    # --- artifacts --------------------------------------------------------------------------------------------------

    def clusters_folder(self, name: str) -> Path:
        """Return the folder of a clustering; a UserError says that none can have this name."""
        return CLUSTERING.path(self.folder, name)

    def drops_folder(self, name: str) -> Path:
        """Return the folder of a drop list; a UserError says that none can have this name."""
        return DROP_LIST.path(self.folder, name)

    def plan_folder(self, name: str) -> Path:
        """Return the folder of a plan; a UserError says that none can have this name."""
        return PLAN.path(self.folder, name)


def _is_ours(path: Path) -> bool:
    """Return True if another process that creates a catalog now may have written the file."""
    if path.name in SERIES and path.is_dir():
        return all(item.name.startswith(layout.HEAD) for item in path.iterdir())
    temporary = path.name.startswith(layout.HEADER) and path.suffix == TEMPORARY_SUFFIX
    return path.name in {layout.HEADER, layout.LOCK} or temporary


def true_path(path: str) -> str:
    """A local path without symbolic links, so that no tar is known by two names."""
    return path if "://" in path else os.path.realpath(path)


def _refuse_shared_paths(paths: Sequence[str]) -> None:
    """Refuses paths of which two lead to one file: the samples of one shard would be read from the other."""
    places = [true_path(path) for path in paths]
    place, times = Counter(places).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"two shards of the catalog would both be {place}: the shards that are to move, and those that the catalog has in that "
            "folder, are different shards; move them to another folder"
        )


@lru_cache(maxsize=8)
def _shards(stamp: FileStamp) -> pa.Table:
    """The table of shards in a file, checked."""
    table = read_table(stamp[0])
    with suppress(UnicodeDecodeError):  # a flipped bit of a path
        if (table.schema.metadata or {}).get(CONTENT) in (None, _content(table).encode()):
            for item in SHARD_SCHEMA:
                if item.name not in table.column_names:  # left out, or of an older version
                    table = table.append_column(item, pa.nulls(len(table), item.type))
            return table.select(SHARD_SCHEMA.names)
    raise DamagedError(f"{stamp[0]} is damaged (its checksum is wrong): restore it")


def _content(shards: pa.Table) -> str:
    """The hash of all rows of the table of shards."""
    names = [name for name in SHARD_SCHEMA.names if name in shards.column_names]
    return digest([shards.column(name).to_pylist() for name in names])


def read_captions(group: RowGroup) -> list[str]:
    """Return the captions of a row group."""
    captions: list[str] = pq.ParquetFile(group[0]).read_row_group(group[1], columns=["caption"]).column(0).to_pylist()
    return captions
