"""Locations of samples in their shards: a dense column of the catalog, made once from its Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import RangedArray, RowsByPart
from tailwise.catalog.files import check_file, create_array, map_array, map_cache, note_digest, read_array
from tailwise.context import Context
from tailwise.errors import DamagedError, UserError
from tailwise.kernels.places import by_value
from tailwise.mapped import release_pages
from tailwise.shards.members import MemberChoice
from tailwise.storage.local import locked, replacing
from tailwise.storage.lru import LRUCache
from tailwise.storage.store_path import is_stored

# caption_bytes is negative where the caption is a field of a JSON, which these bytes hold.
LOCATION = np.dtype(
    [("image_offset", "<i8"), ("caption_offset", "<i8"), ("image_bytes", "<i4"), ("caption_bytes", "<i4")]
)
BATCH_ROWS = 65_536
KEPT_NAMES = 64  # blocks of BATCH_ROWS keys and uids, 2 MB each with short keys
OPEN_PARTS = 128  # every map holds a file descriptor
RELEASE_AFTER_ROWS = 1 << 20


def locations_path(catalog: Catalog, part: Part) -> Path:
    """Return the `.npy` file with the locations of one part."""
    return catalog.folder / layout.LOCATIONS / f"{part.name}{layout.ARRAY}"


def ensure_locations(catalog: Catalog, snapshot: Snapshot, context: Context | None = None) -> None:
    """Write `locations/part-….npy` (LOCATION [rows]; 24 bytes a row) for the parts of a snapshot that lack it.

    Of several processes that call it at the same time, one works, the others wait. It is a UserError if the catalog is read-only, a
    Parquet file is missing or damaged, or a sample has 2 GiB or more.
    """
    context = context or Context()
    if not any(True for _ in _lacking(catalog, snapshot)):
        return  # without the lock, so that a complete catalog may be read-only
    try:
        with locked(catalog.folder / layout.LOCATIONS / layout.LOCK, "locations", wait=True):
            parts = list(_lacking(catalog, snapshot))
            for part in context.progress(parts, "locating samples", len(parts)):
                _write(catalog, part)
    except OSError as error:
        raise UserError(
            f"can't write {catalog.folder / layout.LOCATIONS} ({error.strerror or error}): make the catalog writable and have room "
            f"for {24 * snapshot.rows:,} bytes there the first time it is loaded from; afterwards it may be read-only"
        ) from error


def _lacking(catalog: Catalog, snapshot: Snapshot) -> Iterator[Part]:
    """Yield the parts without locations; only the headers of the files are read."""
    for part in catalog.parts(snapshot):
        path = locations_path(catalog, part)
        try:
            array = read_array(path)
        except (OSError, ValueError, EOFError):
            yield part
            continue
        if not layout.marker(path).exists() or array.shape != (part.rows,) or array.dtype != LOCATION:
            yield part


def _write(catalog: Catalog, part: Part) -> None:
    source = check_file(catalog.samples_path(part.number))
    names = list(LOCATION.names or ())
    of_json = ["json_offset"] if MemberChoice.of(catalog).fields else []
    with replacing(locations_path(catalog, part), unique=True) as temporary:
        out = create_array(temporary, (part.rows,), LOCATION)
        done = 0
        try:
            with pq.ParquetFile(source) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=names + of_json):
                    for name in names:
                        values = batch.column(name).cast(pa.from_numpy_dtype(LOCATION[name]))
                        out[name][done : done + len(batch)] = values
                    if of_json:
                        held = pc.equal(batch.column("caption_offset"), batch.column("json_offset")).fill_null(False)
                        sizes = out["caption_bytes"][done : done + len(batch)]
                        sizes[np.asarray(held)] *= -1
                    done += len(batch)
        except (FileNotFoundError, pa.ArrowException, ValueError) as error:
            raise DamagedError(
                f"{source} is missing or damaged ({error}): restore it, or import the pool again"
            ) from error
        if done != part.rows:
            raise UserError(f"{source} has {done:,} of {part.rows:,} rows: restore it, or import the pool again")
        del out
    note_digest(locations_path(catalog, part))


class Locations:
    """Locations and names of a snapshot's samples, int64 row numbers [n] in any order. May be pickled.

    `ensure_locations` has made the locations; their files are mapped when they are needed. A row that is not there is an IndexError.

    Attributes:
        fields: of samples' JSON that are captions, see `MemberChoice`.
    """

    def __init__(self, catalog: Catalog, snapshot: Snapshot, *, open_parts: int = OPEN_PARTS) -> None:
        self._catalog, self._snapshot = catalog, snapshot
        self._rows = RowsByPart(catalog.parts(snapshot))
        self._maps: LRUCache[int, npt.NDArray[Any] | RangedArray] = LRUCache(open_parts)
        self._names: LRUCache[tuple[int, int], tuple[pa.ChunkedArray, pa.ChunkedArray]] = LRUCache(KEPT_NAMES)
        self._read_rows = 0
        self.fields = MemberChoice.of(catalog).fields

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": LRUCache(self._maps.most), "_names": LRUCache(self._names.most)}

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the locations of rows, LOCATION [n]."""
        out = np.empty(len(rows), LOCATION)
        for part, where in self._rows.split(rows):
            locations = self._maps.get(part.number, partial(self._map, part))
            out[where] = locations[rows[where] - part.first_row]
        self._read_rows += len(rows)
        if self._read_rows > RELEASE_AFTER_ROWS:  # else all pages would count as memory of this process
            self._read_rows = 0
            for array in self._maps.values():
                release_pages(array)
        return out

    def names(self, rows: npt.NDArray[np.int64]) -> list[tuple[str, str]]:
        """Return (key, uid as 32 hexadecimal digits) of each row. Row groups that hold them are read, and the latest ones kept."""
        names = [("", "")] * len(rows)
        for part, where in self._rows.split(rows):
            positions, local = np.arange(len(rows))[where], rows[where] - part.first_row
            for block, mine in by_value(local // BATCH_ROWS):
                keys, uids = self._names.get((part.number, block), partial(self._read_names, part, block))
                for position, at in zip(positions[mine].tolist(), (local[mine] % BATCH_ROWS).tolist(), strict=True):
                    names[position] = keys[at].as_py(), uids[at].as_py().hex()
        return names

    def _read_names(self, part: Part, block: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        rows = np.arange(block * BATCH_ROWS, min((block + 1) * BATCH_ROWS, part.rows))
        table = self._catalog.samples_at(part.number, rows, ["key", "uid"]).combine_chunks()
        return table.column("key"), table.column("uid")

    def _map(self, part: Part) -> npt.NDArray[Any] | RangedArray:
        path = locations_path(self._catalog, part)
        array = _open(path)
        if array is None:  # damaged since this process started
            with suppress(OSError):  # the catalog is read-only: refused below
                layout.marker(path).unlink(missing_ok=True)
            ensure_locations(self._catalog, self._snapshot)
            array = map_array(path)
        if array.shape != (part.rows,) or array.dtype != LOCATION:
            raise UserError(f"{path} has {len(array):,} rows, its part {part.rows:,}: delete it, and it is made again")
        return array


def _open(path: Path) -> npt.NDArray[Any] | RangedArray | None:
    """Map the locations of a part, or open them to be read by ranges, if they are in an object store; None if they are damaged."""
    if not is_stored(path):
        return map_cache(path)
    with suppress(OSError, ValueError):
        return RangedArray(path)
    return None
