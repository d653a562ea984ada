"""A plan as a folder to share: which samples it draws, and all that decides its epochs. `plan --from` reads it on another copy of the pool.

A plan whose epochs are all the same is its copies of each sample. Other plans keep what their draws are functions of: the rate, or group
and rank, of each sample; its row, of Bernoulli draws; and sizes and quotas of the groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.artifacts import find_manifest
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import MODALITIES, column_record, column_records
from tailwise.catalog.files import file_digest
from tailwise.catalog.kinds import named_inputs
from tailwise.catalog.noted import noted_hashes
from tailwise.catalog.outputs import check_output_folder, writing_output
from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import DamagedError
from tailwise.execution.keys import as_hashes
from tailwise.export.drawn import DrawnEpoch, map_epoch, nothing_removed_since
from tailwise.extras import versions
from tailwise.plan.plan import Plan
from tailwise.requests import ExportRequest
from tailwise.shards.content import hashed_uid
from tailwise.shards.noted import hashes_of_part, noted_texts
from tailwise.text import plain

FORMAT = 1
RECORD, SAMPLES, CARD = "plan.json", "plan.parquet", "README.md"
TEXTS = ("sha256", "url")  # what sources note of samples, beside the uid
SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),  # 32 hexadecimal digits
        *(pa.field(name, pa.string()) for name in TEXTS),  # null where no source notes it
        pa.field("rate", pa.float64(), nullable=False),  # expected copies in epoch 0
        pa.field("copies", pa.uint8()),  # in each epoch; null where epochs differ
        pa.field("group", pa.int32()),  # null of a plan by rate, and where all epochs are the same
        pa.field("rank", pa.int64()),  # in the group
        pa.field("row", pa.int64(), nullable=False),  # of the catalog that it was exported from, ascending
    ]
)


def write_plan_bundle(
    plan: Plan, _epoch: int, path: Path, overwrite: bool, request: ExportRequest, context: Context
) -> int:
    """Write a folder with SAMPLES, the groups, RECORD and CARD; return the number of samples.

    The same plan gives the same bytes. The url and sha256 of a sample are read from where its import found them.

    Raises:
        ConflictError: the folder holds something else, or another bundle without `overwrite`.
        DamagedError: a source cannot be read.
        RemovedMeanwhileError: samples were removed meanwhile.
    """
    check_output_folder(path, "`output`", [RECORD])
    path.mkdir(parents=True, exist_ok=True)
    removed = Removals.of(plan.catalog, plan.snapshot).id
    writing = partial(writing_output, catalog=plan.catalog, overwrite=overwrite, is_ours=lambda _: True)
    total, uids = 0, True
    with writing(path / SAMPLES) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for table, given in map_epoch(plan, 0, _table, plan.catalog.parts(plan.snapshot), context):
            writer.write_table(table)
            total, uids = total + len(table), uids and given
    names = [SAMPLES]
    for name in (layout.GROUP_TABLE, layout.QUOTAS) if plan.changes else ():
        if name in plan.manifest["files"]:
            names.append(name)
            with writing(path / name) as temporary:
                temporary.write_bytes((plan.folder / name).read_bytes())
    for name in {layout.GROUP_TABLE, layout.QUOTAS}.difference(names) if overwrite else ():  # of the older bundle
        (path / name).unlink(missing_ok=True)
    files = {name: {"digest": file_digest(path / name), "bytes": (path / name).stat().st_size} for name in names}
    record = {**_record(plan, request), "samples": total, "uids_of_source": uids, "files": files}
    with writing(path / CARD) as temporary:
        temporary.write_text(_card(record), encoding="utf-8")
    with writing(path / RECORD, guard=partial(nothing_removed_since, plan, removed)) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return total


def _table(epoch: DrawnEpoch, part: Part) -> tuple[pa.Table, bool]:
    """Return the samples of a part that some epoch may draw, SCHEMA; and whether all have a uid of the source."""
    plan, fixed = epoch.plan, not epoch.plan.changes
    copies = plan.draw(0, part.span) if fixed else None
    drawn = plan.drawable(part.span) if copies is None else copies > 0
    places = np.flatnonzero(drawn & epoch.removals.keeps(part.span))
    rows, at = part.first_row + places, pa.array(places)
    samples = plan.catalog.samples(part, ["shard", "key", "uid"]).take(at)
    first = plan.catalog.first_states()
    uids = samples.column("uid").to_pylist()
    names = zip(samples.column("shard").to_pylist(), samples.column("key").to_pylist(), strict=True)
    given = all(uid != hashed_uid(int(first[shard]), key) for uid, (shard, key) in zip(uids, names, strict=True))
    nothing = pa.nulls(len(rows), pa.int32())
    grouped = not fixed and not plan.by_rate
    columns = {
        "uid": pa.array([uid.hex() for uid in uids], pa.string()),
        **{name: _noted(plan.catalog, part, name).take(at) for name in TEXTS},
        "rate": pa.array(plan.rate(rows, 0), pa.float64()),
        "copies": nothing.cast(pa.uint8()) if copies is None else pa.array(copies[places], pa.uint8()),
        "group": pa.array(plan.groups[rows], pa.int32()) if grouped else nothing,
        "rank": pa.array(plan.ranks[rows].astype(np.int64)) if grouped else nothing.cast(pa.int64()),
        "row": rows,
    }
    return pa.table(columns, SCHEMA), given


def _noted(catalog: Catalog, part: Part, name: str) -> pa.Array:
    """Return what the sources note of the samples of a part, null where it is not what the import found: strings [rows]."""
    hashes, there = hashes_of_part(catalog, part, name)
    if not there.any():
        return pa.nulls(part.rows, pa.string())
    try:
        texts = pa.array(noted_texts(catalog, part, name), pa.string())
    except OSError as error:
        raise DamagedError(f"the {name} of samples can't be read: {error}; restore the shard") from error
    found, known = as_hashes(noted_hashes(name, texts))
    same = there & known & (found == hashes)
    return pc.if_else(pa.array(same), pc.utf8_lower(texts) if name != "url" else texts, pa.scalar(None, pa.string()))


def _record(plan: Plan, request: ExportRequest) -> dict[str, Any]:
    identity = plan.manifest["identity"]
    made_from = dict(_artifacts(plan.catalog, identity))
    used = {column for made in (identity, *made_from.values()) for column in _columns(made)}
    columns = sorted(path.parent.name for path in column_records(plan.catalog))
    return {
        "format": FORMAT,
        "tailwise": versions(("tailwise",))["tailwise"],
        "name": plan.name,
        "licence": request.licence,
        "fixed": not plan.changes,
        "by_rate": plan.by_rate,
        "rate_groups": bool(plan.config.get("rate_groups")),
        "draw": plan.draw_name,
        "dynamic": plan.dynamic,
        "seed": plan.config["seed"],
        "max_repeats": plan.config.get("max_repeats", 1),
        "plan": {**without_folders(identity), "id": plan.id},
        "summary": dict(plan.summary),
        "snapshot": {"rows": plan.rows, "id": plan.snapshot.id},
        "made_from": without_folders(made_from),
        "encoders": {column: column_record(plan.catalog, column) for column in columns if column in used},
    }


def _artifacts(catalog: Catalog, identity: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and identity of each artifact that another one was made from, with those before it."""
    for kind, name, _ in named_inputs(identity):
        manifest = find_manifest(kind.path(catalog.folder, name))
        if manifest is not None:
            yield f"{kind.section}/{name}", manifest["identity"]
            yield from _artifacts(catalog, manifest["identity"])


def _columns(identity: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns of embeddings that an artifact was made from."""
    config, score = identity["config"], identity["config"].get("score")
    if column := config.get("column"):
        yield column
    for modality in MODALITIES:
        if f"score's {modality} embeddings" in identity["inputs"]:
            yield (score if isinstance(score, Mapping) else {}).get(modality, modality)


def without_folders(value: Any) -> Any:  # noqa: ANN401  (JSON)
    """Return a JSON value, of whose paths on this machine only the names of files are left."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _card(record: Mapping[str, Any]) -> str:
    """Return the README, which the Hugging Face Hub shows as the card of the data set."""
    config, licence = record["plan"]["config"], record["licence"]
    settings = {name: value for name, value in config.items() if value not in (None, [], {}, "")}
    encoders = [f"- `{column}`: {about['encoder']}" for column, about in record["encoders"].items()] or ["- none"]
    each = (
        "every epoch is the same" if record["fixed"] else f"epochs are drawn by {record['draw']}, seed {record['seed']}"
    )
    known = {
        "uid": "of the source" if record["uids_of_source"] else "made by tailwise from shard and key, for some samples"
    }
    lines = [
        "---",
        f"license: {licence or 'other'}",
        "configs:",
        "- config_name: default",
        f"  data_files: {SAMPLES}",
        "tags: [tailwise, clip]",
        "---",
        "",
        f"# {record['name']}: a plan of {record['samples']:,} samples",
        "",
        f"Made by tailwise {record['tailwise']} with the method `{config['method']}`, from a pool of",
        f"{record['summary']['pool']:,} samples; {each}.",
        "The folder names samples. It holds no image and no caption.",
        "",
        "## Use",
        "",
        "```sh",
        "tailwise import shards/ my-catalog            # your copy of the pool",
        "tailwise plan my-catalog shared --from FOLDER # or --from hf://datasets/USER/NAME",
        "```",
        "",
        "The plan then gives the same epochs; the command says which samples your copy lacks.",
        "",
        "## Files",
        "",
        f"- `{SAMPLES}`: uid ({known['uid']}), sha256 and url as the pool notes them, `rate` (expected copies",
        "  in epoch 0), `copies` (in each epoch, if all are the same), and the group, rank and row that the draw needs.",
        f"- `{RECORD}`: settings, seeds, hashes of all inputs and files, encoders.",
        "",
        "## Settings",
        "",
        *(f"- {name}: {plain(json.dumps(value))}" for name, value in sorted(settings.items())),
        "",
        "## Encoders",
        "",
        *map(plain, encoders),
        "",
        "## Licence",
        "",
        f"This list: {licence or 'not stated'}. Images, captions and weights of encoders have licences of their own.",
        "",
    ]
    return "\n".join(lines)
