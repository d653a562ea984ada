"""Exact duplicates, by hashes of images: no embeddings, linear cost.

Hashes are regrouped into buckets of about BUCKET_ROWS rows; in a bucket, the first of equal ones in keep-order stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PartColumn, RowsByPart
from tailwise.catalog.drops import Survivors
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, WithWorker, Worker
from tailwise.execution.keys import BUCKET_ROWS, HASH, bits_of_buckets, buckets_of
from tailwise.execution.shuffle import Shuffle
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.requests import DedupRequest, ScoreRequest
from tailwise.steps.dedup.hashes import HASHED, has_hash, hash_images
from tailwise.steps.drops import drop_table, write_drops
from tailwise.steps.scoring.scores import make_score, score_inputs
from tailwise.storage.local import scratch
from tailwise.text import did_you_mean

ORDERS = ("random", "score")  # beside the order of rows
_RECORD = np.dtype([*HASH.descr, ("order", "<f8"), ("row", "<i8")])
_RESULT = np.dtype([("row", "<i8"), ("other", "<i8")])


@dataclass(frozen=True, eq=False)
class _Hashed:
    """Address of the hashes of a pool, and of what is made of them."""

    catalog: Path  # its folder
    snapshot: Snapshot
    request: DedupRequest
    hashes: PartColumn
    scores: PartColumn | None  # of `order` score
    folder: Path  # of intermediate files
    bits: int  # of a hash that say its bucket

    def parts(self, worker: Worker) -> list[Part]:
        return worker.cached((self.folder, "parts"), lambda: Catalog.open(self.catalog).parts(self.snapshot))

    def survivors(self, worker: Worker) -> Survivors:
        make = lambda: Survivors(Catalog.open(self.catalog), self.request.without, self.snapshot)  # noqa: E731
        return worker.cached((self.folder, "survivors"), make)

    @property
    def shuffle(self) -> Shuffle:
        """The hashes by bucket, one file a part."""
        return Shuffle(self.folder / layout.HASHES, _RECORD, 1 << self.bits)

    def results(self, parts: int) -> Shuffle:
        """Return the duplicates by part, one file a bucket."""
        return Shuffle(self.folder / "results", _RESULT, parts)

    def order(self, part: Part) -> npt.NDArray[np.float64]:
        """Return the keep-order of the rows of a part, float64 [n]: ties by row, NaN last."""
        if self.scores is not None:
            return -self.scores.read(part).astype(np.float64)
        if self.request.order == "random":
            key = stream_key(self.request.seed, "keep-order")
            return np.asarray(hash_range(key, part.first_row, part.rows) >> np.uint64(11), np.float64)
        return np.zeros(part.rows)

    def spill(self, part: Part, worker: Worker) -> None:
        hashes = self.hashes.read(part)
        rows = np.flatnonzero(self.survivors(worker).keeps(part.span) & has_hash(hashes))
        records = np.empty(len(rows), _RECORD)
        records["high"], records["low"] = hashes[rows].T
        records["order"], records["row"] = self.order(part)[rows], part.first_row + rows
        self.shuffle.write(part.name, [(buckets_of(records, self.bits), records)])

    def find(self, bucket: int, worker: Worker) -> int:
        """Find the duplicates of a bucket; return how many rows it has."""
        parts = self.parts(worker)
        records = self.shuffle.read([part.name for part in parts], bucket)
        records = records[np.lexsort([records[name] for name in ("row", "order", "low", "high")])]
        same = np.zeros(len(records), np.bool_)
        same[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(records))))
        results = np.empty(int(same.sum()), _RESULT)
        results["row"], results["other"] = records["row"][same], records["row"][first[same]]
        numbers = RowsByPart(parts).numbers_of(results["row"])
        self.results(len(parts)).write(str(bucket), [(numbers, results)])
        return len(records)

    def dropped(self, part: Part, worker: Worker) -> pa.Table:
        """Return the rows of a part that are dropped: DROPPED_SCHEMA."""
        names = [*map(str, range(1 << self.bits))]
        found = self.results(len(self.parts(worker))).read(names, part.number)
        found = found[np.argsort(found["row"])]
        reasons, similarity = pa.repeat(f"identical {self.request.exact}", len(found)), np.ones(len(found))
        return drop_table(
            {"row": found["row"], "reason": reasons, "kept_row": found["other"], "similarity": similarity}
        )


def check_exact(request: DedupRequest) -> None:
    """Refuse what cannot be hashed, and orders that need clusters."""
    if request.exact not in HASHED:
        raise UserError(f"`exact` {request.exact!r}: {did_you_mean(request.exact, HASHED)}")
    if request.order not in {None, *ORDERS}:
        raise UserError(f"`order` {request.order!r}: with `exact`, use {' or '.join(ORDERS)}, or leave it out")
    if (request.order == "score") != (request.score is not None):
        raise UserError("`order` score and `score` NAME need each other")


def drop_identical(catalog: Catalog, request: DedupRequest, context: Context) -> None:
    """Make a drop list of the images of the newest snapshot that are identical to an earlier one; see `dedup`.

    Raises:
        UserError: something asked for is out of bounds or isn't there, or another list has this name.
    """
    check_exact(request)
    snapshot, of = catalog.snapshot(), str(request.exact)
    parts, survivors = catalog.parts(snapshot), Survivors(catalog, request.without, snapshot)
    config = {
        "exact": of,
        "order": request.order,
        "score": request.score,
        "seed": request.seed if request.order == "random" else None,
        "without": list(request.without),
        "snapshot": snapshot.number,
    }
    score = None if request.score is None else ScoreRequest(request.score)
    inputs = {"snapshot": snapshot.id, **survivors.inputs}
    inputs |= {} if score is None else score_inputs(catalog, snapshot, score)
    with Artifact(catalog.drops_folder(request.list_name), "dedup", config, inputs) as artifact:
        if artifact.done:
            return
        hashes = hash_images(catalog, snapshot, of, context)
        scores = None if score is None else make_score(catalog, snapshot, score, context)
        with scratch(artifact.path(layout.WORK)) as folder:
            bits = bits_of_buckets(snapshot.rows, BUCKET_ROWS)
            found = _Hashed(catalog.folder, snapshot, request, hashes, scores, folder, bits)
            context.run(WithWorker(found.spill), parts, "regrouping hashes", KERNEL)
            judged = sum(context.map(WithWorker(found.find), range(1 << bits), "comparing hashes", KERNEL))
            tables = context.map(WithWorker(found.dropped), parts, "writing", KERNEL)
            dropped = write_drops(artifact, parts, tables, context)
        taking_part = sum(int(survivors.keeps(part.span).sum()) for part in parts)
        artifact.finish(
            {
                "samples": snapshot.rows,
                "judged": taking_part,
                "not_decoded": taking_part - judged,
                "dropped": dropped,
                "dropped_identical": dropped,
                "kept": taking_part - dropped,
            }
        )
