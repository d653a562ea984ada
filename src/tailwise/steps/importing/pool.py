"""Import: shards, metadata and embeddings into a catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Snapshot, true_path
from tailwise.catalog.embeddings import column_modality
from tailwise.catalog.files import write_record
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.errors import MAX_REJECTED, ConflictError, UserError, check_share
from tailwise.requests import SourceRequest
from tailwise.shards.columns import DAMAGE, open_table, uid_texts
from tailwise.shards.containers import containers_of, with_bytes
from tailwise.shards.fingerprint import EVERY, FIRST
from tailwise.shards.members import MemberChoice
from tailwise.shards.metadata import parse_uids
from tailwise.sources import UNREADABLE, Found, find
from tailwise.steps.importing.embeddings import ColumnImport, import_embeddings
from tailwise.steps.importing.joining import Joining
from tailwise.steps.importing.shards import MAX_REJECTED_SAMPLES, PART_ROWS, changed_shards, import_shards
from tailwise.steps.kept import keep_imported
from tailwise.storage.local import locked
from tailwise.storage.store_path import path_of

if TYPE_CHECKING:
    from tailwise.catalog.clusterings import Clustering

DEFAULT_CLUSTERS = "dynamics"
LOOKED_AT = 16  # uids of each metadata file


@dataclass
class ImportReport:
    """Result of an import.

    Attributes:
        catalog: where it went.
        snapshot: the newest snapshot afterwards.
        new_shards: tars, or files of metadata, added by this import.
        new_samples: samples added by this import.
        columns: one entry per embedding column filled.
        rejections: what was left out, by reason.
        clusterings: those made from cluster ids.
        notes: a line for each kind of file that was seen and not read, and for embeddings that were kept.
        changed: paths of shards that have changed since they were imported, and are not replaced.
    """

    catalog: Catalog
    snapshot: Snapshot
    new_shards: int
    new_samples: int
    columns: list[ColumnImport]
    rejections: Rejections
    clusterings: list[Clustering] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def import_pool(
    sources: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    format_name: str = "auto",
    options: SourceRequest | None = None,
    workers: int | None = None,
    part_rows: int = PART_ROWS,
    max_rejected: float | None = None,
    update: bool = False,
    context: Context | None = None,
) -> ImportReport:
    """Imports tars, metadata and embeddings into a catalog, new or existing. What is there already is skipped.

    A file that has changed since it was imported is left out, and named in the report: the catalog keeps its old samples, which can't
    be read any more. With `update`, its new samples take their place.

    Args:
        sources: one or several folders, files, patterns or URLs (see `tailwise.sources.SOURCES`).
        folder: the catalog.
        format_name: a name of `SOURCES`, or "auto".
        options: how the sources are read.
        workers: processes; None for one a processor. The result doesn't depend on it. Worker processes import the calling script
            again, so that it needs the usual `if __name__ == "__main__":`.
        part_rows: rows after which a part is closed.
        update: replace the samples of files that have changed, unless nothing good is in them.
        max_rejected: share that may be left out, of the new samples (0.5 by default) and of the rows of embedding files (0.1).
        context: runs the tasks and shows progress.

    Raises:
        UserError: nothing to import, nothing good in it, or too much left out.
    """
    context = context or Context()
    given = [sources] if isinstance(sources, str | Path) else sources
    chosen = options or SourceRequest()
    bounds = (MAX_REJECTED_SAMPLES, MAX_REJECTED) if max_rejected is None else (max_rejected, max_rejected)
    check_share(bounds[0])
    found = find([str(source) for source in given], format_name, chosen)
    there = (path_of(folder) / layout.HEADER).exists()
    if not (found.tars or found.metadata) and not (there and Catalog.open(folder).snapshots()):
        raise UserError(f"{folder} holds no samples yet: import the shards with or before their embeddings")
    catalog = Catalog.create(folder)
    with locked(catalog.folder / layout.LOCK, str(catalog.folder)):
        catalog.series(layout.SNAPSHOTS).settle()
        joining = Joining(catalog, Rejections(), bounds[1], context, workers)
        return _import(joining, found, chosen, {"part_rows": part_rows, "max_rejected": bounds[0]}, update=update)


def _import(
    joining: Joining, found: Found, chosen: SourceRequest, limits: Mapping[str, Any], *, update: bool
) -> ImportReport:
    catalog, rejections = joining.catalog, joining.rejections
    modalities = {
        column: column_modality(catalog, column, chosen.of if column == chosen.column else None)
        for column in found.embeddings
    }
    before, clustering = catalog.snapshots(), chosen.clustering or DEFAULT_CLUSTERS
    _check_clusters(catalog, clustering, found)
    members = _member_choice(catalog, chosen)
    changed = changed_shards(catalog, found.tars or found.metadata, EVERY if update else FIRST)
    shared: dict[str, Any] = {"workers": joining.workers, "members": members, **limits}
    shared["replacing"] = changed if update else {}
    with rejections.writer(layout.rejected_log(catalog.folder, layout.IMPORT_LOG, layout.SOURCES_LOG)) as log:
        for item in found.left_out:
            log.add("import", item.reason, item.path, None, item.remedy, rows=0)
    shards = found.tars or found.metadata
    if found.tars or not found.metadata:
        import_shards(
            catalog, found.tars, rejections, joining.context, metadata=found.metadata, failed=found.failed, **shared
        )
    else:
        _refuse_known(catalog, found)
        import_shards(catalog, found.metadata, rejections, joining.context, **shared)
    left = [path for path, old in changed.items() if old["shard"] not in catalog.replaced()]
    known = {*catalog.shards().column("path").to_pylist()}
    left += [item.path for item in found.left_out if item.reason == UNREADABLE and item.path in known]
    given, kept = _given_shards(catalog, shards, left), keep_imported(catalog)
    joining = replace(joining, given=given)
    made = [import_embeddings(joining, column, files, modalities[column]) for column, files in found.embeddings.items()]
    columns = [column for column in made if column]
    clusterings = []
    if found.cluster_ids:
        from tailwise.steps.importing.clusters import import_clusters  # noqa: PLC0415  (imports torch: seconds, and 600 MB)

        clusterings.append(import_clusters(joining, clustering, found.cluster_ids))
    now = catalog.snapshot()
    if rejections.counts and not (columns or clusterings) and shards and not given:
        reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in rejections.counts.items())
        raise UserError(
            f"nothing good in {len(shards)} file(s), first {next(iter(shards))} ({reasons}): see {catalog.folder / layout.REJECTED}"
        )
    old_shards, old_rows = (before[-1].shards, before[-1].rows) if before else (0, 0)
    new = now.shards - old_shards, now.rows - old_rows
    notes = [
        f"{column} embeddings: {count:,} of {rows:,} samples of replaced shards keep theirs, the others have none"
        for column, count, rows in kept
    ]
    return ImportReport(catalog, now, *new, columns, rejections, clusterings, [*found.notes, *notes], left)


def _member_choice(catalog: Catalog, asked: SourceRequest) -> MemberChoice:
    """Return which members of tars, or columns, are images and captions; noted in the catalog, unless they are those by default.

    Raises:
        UserError: the catalog has tars that were imported with another choice.
    """
    known = MemberChoice.of(catalog)
    there = any(container.has_bytes for container in containers_of(catalog.shards()))
    choice = MemberChoice.given(asked.image, asked.caption, known if there else None)
    for name, before, now in zip(("image", "caption"), known.record().values(), choice.record().values(), strict=True):
        if there and now != before:
            raise ConflictError(
                f"`{name}` {','.join(now)}: the shards of {catalog.folder} were imported with {','.join(before)}; leave it out, or import "
                "these shards into a new catalog"
            )
    path = catalog.folder / layout.MEMBERS
    if choice != known and choice != MemberChoice():
        write_record(path, choice.record())
    elif choice != known:
        path.unlink()  # of an import that made no samples
    return choice


def _check_clusters(catalog: Catalog, name: str, found: Found) -> None:
    """Refuses cluster ids that can't become a grouping, before anything is imported."""
    if found.cluster_ids and (catalog.clusters_folder(name) / layout.MANIFEST).exists():
        from tailwise.steps.importing.clusters import check_cluster_ids  # noqa: PLC0415  (as above)

        known = {true_path(path) for path in catalog.shards().column("path").to_pylist()}
        fresh = any(true_path(path) not in known for path in found.tars or found.metadata)
        check_cluster_ids(catalog, name, found.cluster_ids, fresh=fresh)


def _given_shards(catalog: Catalog, sources: Mapping[str, int], changed: Sequence[str]) -> frozenset[int] | None:
    """The shards of the catalog that an import named, new or not, without those that have changed; None if it named none."""
    if not sources:
        return None
    named = {true_path(path) for path in sources.keys() - set(changed)}
    paths: list[str] = catalog.shards().column("path").to_pylist()
    return frozenset(shard for shard, path in enumerate(paths) if true_path(path) in named)


def _refuse_known(catalog: Catalog, found: Found) -> None:
    """Refuses metadata as a pool of its own where the catalog's tars hold its samples, or may hold those of a list of URLs.

    Looks at a few uids of each file only: those of a pool are in tars all together, or not at all.
    """
    shards = catalog.shards()
    paths, tars = set(shards.column("path").to_pylist()), with_bytes(shards).column("shard").to_numpy()
    if len(tars) and found.urls:
        raise UserError(
            f"{catalog.folder} holds images, and {next(iter(found.urls))} is a list of URLs, which may be theirs: use a new catalog for it"
        )
    asked = (
        {uid: path for path in found.metadata if path not in paths for uid in _first_uids(path)} if len(tars) else {}
    )
    if not asked:
        return
    for part in catalog.parts():
        samples = catalog.samples(part, ["shard", "uid"])
        inside = np.isin(samples.column("shard").to_numpy(), tars)
        for uid in samples.column("uid").filter(pa.array(inside)).to_pylist():
            if uid in asked:
                raise UserError(
                    f"shards in {catalog.folder} hold samples of {asked[uid]} (uid {uid.hex()}) already: name the shards in the same "
                    "import, for their embeddings; or use a new catalog for the metadata alone"
                )


def _first_uids(path: str) -> list[bytes]:
    try:
        with open_table(path, ["uid"]) as file:
            uids = [uid_texts(batch.column(0)) for batch in islice(file.iter_batches(LOOKED_AT, ["uid"]), 1)]
    except DAMAGE:  # its damage is reported when it is read
        return []
    return [row.tobytes() for batch in uids for row in parse_uids(batch)[0]]
