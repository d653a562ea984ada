"""Import: shards and embeddings into a catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tailwise.catalog.catalog import HEADER, LOCK, Catalog, Snapshot, local_path
from tailwise.catalog.locks import locked
from tailwise.errors import UserError
from tailwise.progress import Track, silent
from tailwise.sources import Found, find
from tailwise.stages.import_embeddings import ColumnImport, import_embeddings
from tailwise.stages.import_shards import PART_ROWS, import_shards
from tailwise.stages.report import Rejections


@dataclass
class ImportReport:
    """What an import came to.

    Attributes:
        catalog: where it went.
        snapshot: the newest snapshot afterwards.
        new_shards: tars added by this import.
        new_samples: samples added by this import.
        columns: one entry per embedding column filled.
        rejections: what was left out, by reason.
    """

    catalog: Catalog
    snapshot: Snapshot
    new_shards: int
    new_samples: int
    columns: list[ColumnImport]
    rejections: Rejections


def import_pool(
    sources: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    format_name: str = "auto",
    workers: int | None = None,
    part_rows: int = PART_ROWS,
    track: Track = silent,
) -> ImportReport:
    """Imports tars and embeddings into a catalog, new or existing. What is there already is skipped.

    Args:
        sources: one or several folders, files, patterns or URLs (see `tailwise.sources.SOURCES`).
        folder: the catalog.
        format_name: a name of `SOURCES`, or "auto".
        workers: processes; None for one a processor. The result doesn't depend on it. Worker processes import the calling script
            anew, so that it needs the usual `if __name__ == "__main__":`.
        part_rows: rows after which a part is closed.
        track: shows progress.

    Raises:
        UserError: nothing to import, or nothing good in it.
    """
    given = [sources] if isinstance(sources, str | Path) else sources
    found = find([str(source) for source in given], format_name)
    there = (local_path(folder) / HEADER).exists()
    if not found.tars and not (there and Catalog.open(folder).snapshots()):
        raise UserError(f"{folder} holds no samples yet: import the shards (.tar) with or before their embeddings")
    catalog = Catalog.create(folder)
    with locked(catalog.folder / LOCK, str(catalog.folder)):
        return _import(catalog, found, workers, part_rows, track)


def _import(catalog: Catalog, found: Found, workers: int | None, part_rows: int, track: Track) -> ImportReport:
    before = catalog.snapshots()
    rejections = Rejections()
    import_shards(catalog, found.tars, rejections, track, workers=workers, part_rows=part_rows)
    columns = [
        made
        for column, partitions in found.embeddings.items()
        if (made := import_embeddings(catalog, column, partitions, rejections, track))
    ]
    now = catalog.snapshot()
    known = set(catalog.shards().column("path").to_pylist())
    if rejections.counts and not columns and found.tars and known.isdisjoint(found.tars):
        reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in rejections.counts.items())
        raise UserError(
            f"nothing good in {len(found.tars)} tar(s), first {next(iter(found.tars))} ({reasons}): see {catalog.folder / 'rejected'}"
        )
    old_shards, old_rows = (before[-1].shards, before[-1].rows) if before else (0, 0)
    return ImportReport(catalog, now, now.shards - old_shards, now.rows - old_rows, columns, rejections)
