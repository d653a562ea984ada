"""Import, first half (map): from tars, or tables of metadata, to the catalog's samples, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Snapshot, true_path
from tailwise.catalog.files import known_digest, read_record, read_table, write_record, write_table
from tailwise.catalog.noted import KEPT, NOTED
from tailwise.catalog.rejections import Rejections
from tailwise.catalog.schema import FINGERPRINT, PARQUET, REPLACES, SHARD_SCHEMA
from tailwise.context import Context
from tailwise.errors import UserError, refuse_many
from tailwise.execution.base import Apply, Needs
from tailwise.shards.containers import WEBDATASET, Container, container_of, index_shard
from tailwise.shards.content import ShardContent, hashed_uid, unreadable_shard
from tailwise.shards.fingerprint import (
    FIRST,
    ChangedShardError,
    comparable_shards,
    compare_shard,
    unchanged_bytes,
)
from tailwise.shards.grouping import DEFAULT
from tailwise.shards.members import MemberChoice
from tailwise.sources import UNKNOWN_BYTES
from tailwise.steps.importing.scores import Scores, scores_id
from tailwise.storage.local import scratch
from tailwise.storage.remote import is_remote

PART_ROWS = 1_000_000
MAX_REJECTED_SAMPLES = 0.5  # by default: tars may hold much that is no pair of image and caption
TOLD_ONLY = ("tar without an end", "ambiguous uid")  # no sample is left out
THREADS = 16  # a look at a known tar only waits
SMALL_BYTES = 64 << 20  # local files of this size are indexed before worker processes have started
NOTES = ("scores", "members")  # of a part: what else decides it
ONE_WRITER = Needs(workers=1, results=2)  # parts come one after the other, and are large
UNREADABLE_BYTES = 0  # noted for a tar that could not be read: it is tried again by the next import


@dataclass
class _Part:
    """The shards gathered for one part."""

    number: int  # of the part
    first_shard: int  # the id that its first good shard gets
    tars: list[tuple[str, int]] = field(default_factory=list)  # path and size of every tar read for it, good or not
    shards: list[dict[str, Any]] = field(default_factory=list)  # one SHARD_SCHEMA row for each tar with samples
    samples: list[tuple[int, pa.Table]] = field(default_factory=list)  # shard, and its samples as they were read
    rejected: list[pa.Table] = field(default_factory=list)
    rows: int = 0

    def add(self, path: str, content: ShardContent, old: Mapping[str, Any] | None) -> None:
        """Add a file, and the shard (a row of SHARD_SCHEMA) with its earlier state."""
        self.tars.append((path, content.size_bytes))
        self.rejected.append(content.rejected)
        rows = content.samples.num_rows
        if not rows:
            return
        shard = self.first_shard + len(self.shards)
        self.shards.append(
            {
                "shard": shard,
                "path": path,
                "part": self.number,
                "rows": rows,
                "size_bytes": content.size_bytes,
                "index_checksum": content.index_checksum,
                FINGERPRINT: content.fingerprint,
                PARQUET: content.parquet,
            }
        )
        if old is not None:
            comparable = content.parquet is None and old[PARQUET] is None and path.endswith(WEBDATASET.suffix)
            same = unchanged_bytes(path, old["size_bytes"], old[FINGERPRINT]) if comparable else 0
            self.shards[-1][REPLACES] = {"shard": old["shard"], "same_bytes": same}
        self.samples.append((shard, content.samples))
        self.rows += rows


def _identified(samples: pa.Table, shard: int, first_state: int) -> pa.Table:
    """Fills in the shard's id, and a hashed uid where the source gave none: that of the file's first state."""
    columns = {"shard": pa.array(np.full(samples.num_rows, shard, np.int32)), "uid": samples.column("uid")}
    if columns["uid"].null_count:
        given = zip(columns["uid"].to_pylist(), samples.column("key").to_pylist(), strict=True)
        columns["uid"] = pa.array([uid or hashed_uid(first_state, key) for uid, key in given], pa.binary(16))
    for name, values in columns.items():
        index = samples.schema.get_field_index(name)
        samples = samples.set_column(index, pa.field(name, values.type, nullable=False), values)
    return samples


def import_shards(
    catalog: Catalog,
    tars: dict[str, int],
    rejections: Rejections,
    context: Context,
    *,
    workers: int | None,
    part_rows: int = PART_ROWS,
    metadata: Mapping[str, int] | None = None,
    failed: Mapping[str, str] | None = None,
    max_rejected: float = MAX_REJECTED_SAMPLES,
    members: MemberChoice = DEFAULT,
    replacing: Mapping[str, Mapping[str, Any]] | None = None,
) -> Snapshot | None:
    """Index files that the catalog does not have yet; return a new snapshot of old and new shards, or None without new samples.

    Args:
        catalog: catalog to extend.
        tars: path or URL → size in bytes, of tars or of files of another container.
        rejections: takes what is left out.
        context: runs the tasks and shows progress.
        workers: processes; None for one a processor, or this process alone for small local files. The result does not depend on it.
        part_rows: a part is closed by the shard that brings it to this many rows.
        metadata: path → size of DataComp's metadata, whose scores are joined by uid.
        failed: path → why this tar cannot be read; it is rejected without another try.
        max_rejected: share of the new samples that may be left out.
        members: of tars that are images and captions.
        replacing: files that replace a shard, as `changed_shards` returns them. They come first, in parts of their own.

    Raises:
        UserError: the catalog is empty and there are no samples.
    """
    before, known, replacing = catalog.snapshots(), catalog.shards(), replacing or {}
    if not (new := _new_tars(catalog, known, tars, replacing)):
        return None
    container = container_of(new[0][0], members)
    part = _Part(before[-1].parts if before else 0, known.num_rows)
    shards: list[dict[str, Any]] = []
    rest, first = new, part.number
    notes: dict[str, Any] = {"scores": scores_id(metadata)} if metadata else {}
    notes |= {"members": members.record()} if members != DEFAULT else {}
    for resumed in _resumed_parts(catalog, part, new, notes):
        shards += resumed["shards"]
        rest = rest[len(resumed["tars"]) :]
        rejections.count(_listed(catalog, part.number))
        part = _Part(part.number + 1, part.first_shard + len(resumed["shards"]))
    with _scores(catalog, range(first, part.number), metadata, bool(rest), rejections, context) as scores:
        read = _contents(context, rest, failed or {}, workers, members)
        contents = context.progress(read, container.indexing, len(rest))
        joined = ((path, scores.join(content, path) if scores else content) for path, content in contents)
        write = Apply(partial(_write_part, catalog.folder, notes))
        gathered = _gathered(part, joined, part_rows, replacing)
        for number, part_shards in context.executor.map(write, gathered, ONE_WRITER):
            shards += part_shards
            rejections.count(_listed(catalog, number))
    if shards or before:
        _check_left_out(catalog, sum(shard["rows"] for shard in shards), rejections, max_rejected)
    if shards:
        return catalog.append_snapshot(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA), shards[-1]["part"] + 1)
    if not before:
        raise _no_samples(new, container, rejections)
    return None


def _no_samples(new: Sequence[tuple[str, int]], container: Container, rejections: Rejections) -> UserError:
    reasons = ", ".join(f"{reason}: {rows:,}" for (_, reason), rows in rejections.counts.items()) or "all are empty"
    remedy = ": name other suffixes or columns with `image` and `caption`" * container.has_bytes
    listed = f"; see {rejections.files[0].parent}" if rejections.files else ""
    return UserError(
        f"no sample with {container.needed} in {len(new)} new file(s), first {new[0][0]} ({reasons}){remedy}{listed}"
    )


def _contents(
    context: Context,
    files: Sequence[tuple[str, int]],
    failed: Mapping[str, str],
    workers: int | None,
    members: MemberChoice,
) -> Iterator[tuple[str, ShardContent]]:
    """Yield the path and the samples of each file; those that have failed are not tried again."""
    left = [(path, size) for path, size in files if path not in failed]
    paths = [path for path, _ in left]
    if sum(size for _, size in left) <= SMALL_BYTES and not any(map(is_remote, paths)):
        workers = workers or 1
    index = index_shard if members == DEFAULT else partial(index_shard, choice=members)
    found = context.executor.map(Apply(index), paths, Needs(workers=workers))
    for path, _ in files:
        yield path, unreadable_shard(path, failed[path]) if path in failed else next(found)


def _check_left_out(catalog: Catalog, imported: int, rejections: Rejections, max_rejected: float) -> None:
    """Refuse a snapshot if too many samples of the new files are left out; its finished parts wait for the same import."""
    counts = {reason: rows for (stage, reason), rows in rejections.counts.items() if stage == "import"}
    rejected = sum(rows for reason, rows in counts.items() if reason not in TOLD_ONLY)
    reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in sorted(counts.items()))
    causes = f"{reasons}; finished parts are kept; see {catalog.folder / layout.REJECTED}"
    refuse_many(rejected, imported + rejected, max_rejected, "{} samples{} of new files are left out", causes)


@contextmanager
def _scores(
    catalog: Catalog,
    done: range,
    metadata: Mapping[str, int] | None,
    more: bool,
    rejections: Rejections,
    context: Context,
) -> Iterator[Scores | None]:
    """Yields the scores of metadata, for the parts after `done`, which an interrupted import has joined; lists the rows that none got."""
    listed = _listed(catalog, done.start, layout.SCORES_LOG)
    if not metadata:
        yield None
    elif not more and listed.exists():
        rejections.count(listed)
        yield None
    else:
        folder = catalog.folder / layout.SAMPLES / layout.JOINING
        with scratch(folder, own=True) as work, rejections.writer(listed) as log:
            scores = Scores(list(metadata), work, log, context)
            for part in done:
                scores.find(read_table(catalog.samples_path(part), ["uid"]).column("uid").to_pylist())
            yield scores
            scores.list_unused(log)


def changed_shards(catalog: Catalog, tars: Mapping[str, int], step: int = FIRST) -> dict[str, dict[str, Any]]:
    """Return which files have another length, or other blocks, than when they were imported.

    `tars`: path or URL → size in bytes, of files that may be in the catalog. Files that can't be read are passed over. `step`: which blocks
    are compared, see `check_fingerprint`.

    Returns:
        Path → the shard with its earlier state, a row of SHARD_SCHEMA.
    """
    known = catalog.shards()
    given = known.filter(pc.is_in(known["path"], pa.array(list(tars), pa.string())))
    again = comparable_shards(catalog, table=given).to_pylist() if len(given) else []

    def changed(shard: Mapping[str, Any]) -> bool:
        if tars[shard["path"]] not in {shard["size_bytes"], UNKNOWN_BYTES}:
            return True
        try:
            compare_shard(shard["path"], shard[FINGERPRINT], step)
        except ChangedShardError:
            return True
        except OSError:
            return False
        return False

    with ThreadPoolExecutor(THREADS) as pool:
        return {shard["path"]: shard for shard, other in zip(again, pool.map(changed, again), strict=True) if other}


def _new_tars(
    catalog: Catalog, known: pa.Table, tars: Mapping[str, int], replacing: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """The tars that replace another one; and those that are neither known nor were found to hold nothing good in an earlier import."""
    parts = range(catalog.snapshot().parts if len(known) else 0)
    read = {tuple(item) for part in parts for item in read_record(_marker(catalog, part))["tars"]}
    new = [(path, tars[path]) for path in replacing]
    seen = {true_path(path) for path in known["path"].to_pylist()}
    for path, size in tars.items():
        if (true := true_path(path)) not in seen and (path, size) not in read:
            new.append((path, size))
        seen.add(true)
    return new


def _marker(catalog: Catalog, part: int) -> Path:
    return layout.marker(catalog.samples_path(part))


def _listed(catalog: Catalog, part: int, *of: str) -> Path:
    return layout.rejected_log(catalog.folder, layout.IMPORT_LOG, *of, layout.part_name(part))


def _resumed_parts(
    catalog: Catalog, first: _Part, tars: Sequence[tuple[str, int]], notes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The parts that an interrupted import of the same tars, with the same metadata, has finished, from `first` on."""
    position, number, shard = 0, first.number, first.first_shard
    while (marker := _marker(catalog, number)).exists():
        content = read_record(marker)
        part_tars = [tuple(item) for item in content["tars"]]
        now = tars[position : position + len(part_tars)]
        same = len(now) == len(part_tars) and all(
            path == old_path and (old_size in {size, UNREADABLE_BYTES} or size == UNKNOWN_BYTES)
            for (path, size), (old_path, old_size) in zip(now, part_tars, strict=True)
        )
        if (
            not same
            or content["shards"][0]["shard"] != shard
            or any(content.get(name) != notes.get(name) for name in NOTES)
        ):
            break
        yield content
        position, number, shard = position + len(part_tars), number + 1, shard + len(content["shards"])


def _gathered(
    part: _Part, contents: Iterable[tuple[str, ShardContent]], part_rows: int, replacing: Mapping[str, Any]
) -> Iterator[_Part]:
    """Yield whole parts, from an empty one on. Tars without samples go with the part before them."""
    for path, content in contents:
        others = bool(part.shards) and (REPLACES in part.shards[-1]) != (path in replacing)
        if (part.rows >= part_rows or others) and content.samples.num_rows:
            yield part
            part = _Part(part.number + 1, part.first_shard + len(part.shards))
        part.add(path, content, replacing.get(path))
    if part.tars:
        yield part


def _write_part(folder: Path, notes: Mapping[str, Any], part: _Part) -> tuple[int, list[dict[str, Any]]]:
    """Writes samples and rejections of one part, its marker last; returns its number and its shards."""
    catalog = Catalog.open(folder)
    path = catalog.samples_path(part.number)
    _marker(catalog, part.number).unlink(missing_ok=True)  # of an abandoned import
    with Rejections().writer(_listed(catalog, part.number)) as log:
        for table in part.rejected:
            log.add_table(table)
    if part.samples:
        first = catalog.first_states()
        replaced = {shard["shard"]: shard[REPLACES]["shard"] for shard in part.shards if REPLACES in shard}
        samples = [
            _identified(samples, shard, int(first[replaced[shard]]) if shard in replaced else shard)
            for shard, samples in part.samples
        ]
        write_table(path, pa.concat_tables(samples, promote_options="default"))
        content = {"tars": part.tars, "shards": part.shards, "digest": known_digest(path)}
        write_record(_marker(catalog, part.number), {**content, **notes, KEPT: list(NOTED)})
    return part.number, part.shards
