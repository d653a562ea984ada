"""New shards: an epoch's samples as a new webdataset, all shuffled together."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tailwise.catalog.files import read_json, read_table, write_json
from tailwise.catalog.outputs import check_output_folder
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import NotFoundError, UserError
from tailwise.execution.base import Apply, Needs, default_workers
from tailwise.export.drawn import RemovedMeanwhileError, nothing_removed_since
from tailwise.export.shard_writer import CACHE_BYTES, SCRATCH, SUCCESS, ShardWriter, shard_count
from tailwise.export.shuffled import Epoch, survey, write_runs
from tailwise.loader.captions import CaptionMix
from tailwise.loader.pool import require_bytes
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest, caption_weights
from tailwise.shards.verify import check_shards
from tailwise.storage.local import TEMPORARY_SUFFIX, locked, remove_temporary_files, replacing, scratch

FORMAT = 1  # to be raised when the same plan gives other bytes
HEAD = "export.json"
LOCK = ".lock"
REJECTED = "rejected.jsonl"  # no Parquet file: OUTPUT/*.parquet are one table
SIZES = "sizes.json"
SOURCES = "source_shards.jsonl"
_OUTPUT = re.compile(r"(\d{8})(?:\.tar|\.parquet|_stats\.json)")
MAX_SHARDS = 10**8  # names of 8 digits
LEAST_ITEMS = 4  # for each worker, where there are enough shards
# A worker looks through all runs once for this number of copies, and holds what is known of each: about 300 bytes.
GROUP_COPIES = 1 << 18


@dataclass(frozen=True)
class ShardsWritten:
    """Result of an export of shards."""

    samples: int  # number of samples in the new shards
    shards: int  # number of shards
    rejected: Mapping[str, int]  # number of samples that were left out, by reason


def write_shards(
    plan: Plan, epoch: int, folder: Path, sharding: ExportRequest | None = None, context: Context | None = None
) -> ShardsWritten:
    """Write an epoch as a webdataset in img2dataset's layout, all samples shuffled together.

    Finished shards are kept: a rerun of an interrupted export resumes it, and the bytes are the same in the end. Remote tars of the source
    are read through a cache in `folder`, which is removed in the end. The folder is new or empty, or that of an unfinished export of the
    same epoch.

    Raises:
        UserError: the folder holds anything else, too many samples cannot be read, or the plan draws samples that are in no tar.
    """
    context = context or Context()
    sharding = sharding or ExportRequest()
    epoch = plan.drawn_epoch(epoch)
    require_bytes(plan)
    _check_folder(folder)
    removed = Removals.of(plan.catalog, plan.snapshot).id
    held = survey(plan, epoch, context)
    if not 0 < held.copies <= sharding.shard_samples * MAX_SHARDS:
        allowed = f"between 1 and {MAX_SHARDS:,} shards of {sharding.shard_samples:,} samples can be written"
        raise UserError(f"epoch {epoch} of plan {plan.name!r} holds {held.copies:,} samples: {allowed}")
    identity = {  # all that decides the bytes
        "format": FORMAT,
        "plan": plan.id,
        "epoch": epoch,
        "copies": held.copies,
        "drawn": held.digest,
        "shard_samples": sharding.shard_samples,
    }
    captions = caption_weights(sharding.captions)
    if captions:
        identity |= {"captions": captions, "joined": CaptionMix(plan.catalog, captions, 0).ids}
    folder.mkdir(exist_ok=True)
    with locked(folder / LOCK, str(folder)):
        written = _begin(folder, identity)
        place, cache_bytes = folder.absolute(), CACHE_BYTES * (sharding.workers or default_workers())
        writer = ShardWriter(
            plan.catalog, plan.snapshot.number, place, identity, {}, cache_bytes, uuid.uuid4().hex, _mix(plan, captions)
        )
        if written is not None and None not in writer.lacking():
            left = sum(written.rejected.values())
            if left > sharding.max_rejected * held.copies:
                raise UserError(
                    f"{folder} is finished, and lacks {left:,} of {held.copies:,} samples, more than the share {sharding.max_rejected} "
                    "that may be left out (`max_rejected`): name a new folder"
                )
            return written
        writer = replace(writer, damaged=_damaged(plan, held, sharding, context))
        try:
            _write_missing(plan, epoch, held, writer, sharding, context)
            with nothing_removed_since(plan, removed):
                return _finish(plan, writer)
        except RemovedMeanwhileError:
            _discard(folder, identity)
            raise


def _mix(plan: Plan, captions: Mapping[str, float]) -> CaptionMix | None:
    return CaptionMix(plan.catalog, captions, plan.config["seed"]) if captions else None


def left_out(folder: Path) -> dict[str, int]:
    """Return the number of samples that a finished export of shards lacks, by reason; nothing for another export."""
    return dict(read_json(folder / HEAD)["summary"]["rejected"]) if (folder / HEAD).is_file() else {}


# --- the folder ---------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is in a catalog, is no folder, holds something else, or whose parent does not exist."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder")
    check_output_folder(folder, "OUTPUT")
    if not folder.absolute().parent.is_dir():
        raise NotFoundError(f"the folder {folder.absolute().parent} doesn't exist: make it first")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if HEAD not in there and there - {LOCK, HEAD + TEMPORARY_SUFFIX}:
        raise UserError(f"{folder} holds files that are of no export: name a new or an empty folder")


def _begin(folder: Path, identity: Mapping[str, Any]) -> ShardsWritten | None:
    """Write what is exported; return the result if the export is finished."""
    path = folder / HEAD
    if not path.exists():
        write_json(path, {"identity": identity})
        return None
    head = read_json(path)
    found = head.get("identity") if isinstance(head, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{folder} holds files that are of no export: name a new or an empty folder")
    if found != identity:
        others = [name for name in {**identity, **found} if found.get(name) != identity.get(name)]
        what = f"something else (other: {', '.join(others)})"
        if set(others) <= {"copies", "drawn"}:
            what = "this epoch as it was before samples were removed from the catalog"
            if "summary" not in head:
                _discard(folder, found)
                return _begin(folder, identity)
        raise UserError(f"{folder} holds an export of {what}: name a new folder, or delete that one")
    return ShardsWritten(**head["summary"]) if "summary" in head else None


def _discard(folder: Path, identity: Mapping[str, Any]) -> None:
    """Delete the files of an unfinished export; files of other names stay."""
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    for path in folder.iterdir():
        name = path.name.removesuffix(TEMPORARY_SUFFIX)
        ours = _OUTPUT.fullmatch(name)
        if name in {SIZES, SOURCES, REJECTED, HEAD} or (ours and int(ours[1]) < shard_count(identity)):
            path.unlink()


def _finish(plan: Plan, writer: ShardWriter) -> ShardsWritten:
    """Write the files about all shards, once these are complete."""
    remove_temporary_files(writer.folder, f"{'[0-9]' * 8}*")
    sizes, rejected, lacking = dict[str, int](), Counter[str](), list[Path]()
    for tar, sidecar, stats in map(writer.paths, range(writer.shards)):
        counts = Counter(read_json(stats)["status_dict"])
        sizes[tar.name] = counts.pop(SUCCESS, 0)
        rejected += counts
        lacking += [sidecar] if counts else []
    paths = plan.catalog.shards(plan.snapshot).select(["shard", "path"]).replace_schema_metadata(None)
    _write_lines(writer.folder / SOURCES, paths)
    _write_rejected(writer.folder / REJECTED, lacking, paths)
    write_json(writer.folder / SIZES, sizes)
    written = ShardsWritten(sum(sizes.values()), writer.shards, dict(rejected))
    write_json(writer.folder / HEAD, {"identity": writer.identity, "summary": asdict(written)})
    return written


def _write_rejected(target: Path, sidecars: list[Path], paths: pa.Table) -> None:
    """Write a table of all samples that were left out; no file if there are none."""
    target.unlink(missing_ok=True)
    if not sidecars:
        return
    names = ["source_shard", "source_key", "uid", "copy", "status", "error_message"]
    tables = [read_table(sidecar, names) for sidecar in sidecars]
    table = pa.concat_tables([one.filter(pc.not_equal(one.column("status"), SUCCESS)) for one in tables])
    shards = paths.column("path").take(table.column("source_shard"))
    names = ["shard_id", "key", "uid", "copy", "reason", "detail"]
    _write_lines(target, table.rename_columns(names).add_column(0, "shard", shards))


def _write_lines(target: Path, table: pa.Table) -> None:
    """Write a table as JSON, a row a line."""
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for batch in table.to_batches():
            stream.writelines(f"{json.dumps(row)}\n" for row in batch.to_pylist())


# --- what can't be read -------------------------------------------------------------------------------------------------


def _damaged(plan: Plan, held: Epoch, sharding: ExportRequest, context: Context) -> dict[int, str]:
    """Return the tars that cannot be used, by id, and why. Raise a UserError if they hold more samples than may be left out."""
    found = check_shards(plan.catalog, plan.snapshot, "size", sharding.workers, context=context)
    damaged = {damage.shard: f"{damage.path}: {damage.reason}" for damage in found if held.by_shard[damage.shard]}
    lost = int(held.by_shard[list(damaged)].sum())
    if lost > sharding.max_rejected * held.copies:
        raise UserError(
            f"{lost:,} of {held.copies:,} samples lie in {len(damaged):,} shards that can't be read as they were imported, the first is "
            f"{next(iter(damaged.values()))}; restore them, give their new place (`tailwise relocate`), or raise "
            f"`max_rejected`, now {sharding.max_rejected}"
        )
    return damaged


def _write_missing(
    plan: Plan, epoch: int, held: Epoch, writer: ShardWriter, sharding: ExportRequest, context: Context
) -> None:
    """Write the shards that are not finished.

    If too many samples cannot be read, the shards that lack some are not finished: a rerun writes them again.
    """
    finished = writer.lacking()
    missing = [number for number, count in enumerate(finished) if count is None]
    total = sum(filter(None, finished))
    if missing:
        with scratch(writer.runs):
            write_runs(plan, epoch, held, writer.runs, context)
            workers = sharding.workers or default_workers()
            most = min(GROUP_COPIES // sharding.shard_samples, len(missing) // (LEAST_ITEMS * workers))
            items = list(_groups(missing, max(most, 1)))
            results = context.executor.map(Apply(writer), items, Needs(workers=sharding.workers))
            with closing(writer), closing(results):
                for count in context.progress(chain.from_iterable(results), "writing shards", len(missing)):
                    total += count
                    if total > sharding.max_rejected * held.copies:
                        break
    shutil.rmtree(writer.runs, ignore_errors=True)  # an earlier killed export may have left runs
    if total <= sharding.max_rejected * held.copies:
        return
    lacking = [writer.paths(number) for number, count in enumerate(writer.lacking()) if count]
    example = read_table(lacking[0][1], ["status", "error_message"])
    example = example.filter(pc.not_equal(example.column("status"), SUCCESS)).to_pylist()[0]
    for _, _, stats in lacking:
        stats.unlink()
    raise UserError(
        f"{total:,} of {held.copies:,} samples can't be read so far, more than the share {sharding.max_rejected} that may be left out; "
        f"the first is {example['status']}: {example['error_message']}; mend that, or raise `max_rejected`, and repeat"
    )


def _groups(numbers: Sequence[int], most: int) -> Iterator[range]:
    """Yield ascending numbers as ranges of at most `most`."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1 or at - start == most:
            yield range(numbers[start], numbers[at - 1] + 1)
            start = at
