"""Decontamination: images of the pool that evaluation sets hold leave it, by the nearest embedding, and by hashes of decoded pixels.

The nearest image of the sets is found once for each sample and kept (`neighbours/`), so that another ε reads it.

T: images of all sets; d: dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tailwise.catalog import layout
from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.columns import PartColumn, PlainColumn
from tailwise.catalog.comparisons import Neighbours, comparison_artifact
from tailwise.catalog.drops import AGAINST_SCHEMA, Survivors
from tailwise.catalog.embeddings import check_column, embedding_inputs
from tailwise.catalog.files import map_array, write_array
from tailwise.context import Context
from tailwise.devices import find_device
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.execution.keys import ENTRY, HASH, find_sorted
from tailwise.kernels.assign import Assigner
from tailwise.kernels.grid import row_chunks, unit_rows_on_grid
from tailwise.requests import DedupRequest
from tailwise.steps.dedup.evaluation_sets import EvaluationSet, open_sets
from tailwise.steps.dedup.hashes import has_hash, hash_images
from tailwise.steps.drops import drop_table, write_drops
from tailwise.storage.local import remove_folder, scratch

EPSILONS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)  # at which drops are counted
LEAST_EPSILON = 1e-4  # rows of one image differ by less, if it was embedded in another batch
BLOCK_BYTES, CHUNK_ROWS = 1 << 28, 65_536  # float32 embeddings of the sets, and rows of the pool, at a time
_FOUND = np.dtype([("row", "<i8"), ("number", "<i8"), ("similarity", "<f8"), ("identical", "?")])


def decontaminate(catalog: Catalog, request: DedupRequest, context: Context) -> None:
    """Make a drop list of the images of the newest snapshot that evaluation sets hold; see `dedup`.

    Raises:
        UserError: something asked for is out of bounds or isn't there, or another list has this name.
    """
    _check(request)
    snapshot, column = catalog.snapshot(), None
    if request.epsilon is not None:
        column = check_column(catalog, request.column or "image", "image")
        catalog.require_embeddings(column, snapshot)
    survivors = Survivors(catalog, request.without, snapshot)
    sets = open_sets(catalog, request, column, context)
    shared = {"against": list(request.against), "mirrored": request.mirrored, "snapshot": snapshot.number}
    asked = {"epsilon": request.epsilon, "column": column, "exact": request.exact, "without": list(request.without)}
    of_sets = {f"evaluation set {number}": found.id for number, found in enumerate(sets)}
    embedded = {} if column is None else embedding_inputs(catalog, column, snapshot)
    inputs = {"snapshot": snapshot.id, **embedded, **of_sets, **survivors.inputs}
    with Artifact(catalog.drops_folder(request.list_name), "dedup", {**shared, **asked}, inputs) as artifact:
        if artifact.done:
            return
        against = _Against(catalog, snapshot, sets, request, context)
        nearest = None
        if column is not None:
            nearest = against.nearest(column, {**shared, "column": column}, {**embedded, **of_sets})
        with scratch(artifact.path(layout.WORK)) as folder:
            task = _Find(
                catalog.folder,
                request,
                snapshot,
                None if nearest is None else nearest.folder,
                hash_images(catalog, snapshot, "pixels", context) if request.exact else None,
                against.write_hashes(folder / "entries.npy") if request.exact else None,
            )
            dropped = write_drops(artifact, against.parts, against.tables(task), context, AGAINST_SCHEMA)
        artifact.finish(against.summary(survivors, nearest, dropped))


def _check(request: DedupRequest) -> None:
    if request.epsilon is None and request.exact is None:
        raise UserError("`against` needs `epsilon` (such as 0.05: by embeddings), `exact` pixels (by hashes), or both")
    if request.epsilon is not None and not LEAST_EPSILON <= request.epsilon <= 1:
        raise UserError(f"`epsilon` {request.epsilon}: with `against`, it must lie between {LEAST_EPSILON:g} and 1")
    if request.exact not in {None, "pixels"}:
        raise UserError(f"`exact` {request.exact!r}: with `against`, use pixels; identical files have identical pixels")


class _Against:
    """A pool and the sets that it is compared with. Images of all sets are numbered, mirror images too (see evaluation_sets.py)."""

    def __init__(
        self,
        catalog: Catalog,
        snapshot: Snapshot,
        sets: Sequence[EvaluationSet],
        request: DedupRequest,
        context: Context,
    ) -> None:
        self.parts = catalog.parts(snapshot)
        self._catalog, self._snapshot, self._sets, self._context = catalog, snapshot, sets, context
        self._device, self._views = str(find_device(request.device)), 1 + request.mirrored
        self._firsts = np.cumsum([0, *(found.count for found in sets)])
        self._samples = Counter[tuple[int, bool]]()  # dropped, by set and whether their pixels are identical
        self._hit = np.zeros(self._firsts[-1], np.bool_)  # images that a sample resembles
        self._unhashed = 0  # images that cannot be decoded

    def nearest(self, column: str, config: dict[str, Any], inputs: dict[str, str]) -> Neighbours:
        """Return the nearest image of each row of the pool; made the first time, and kept."""
        context = self._context
        with comparison_artifact(self._catalog, config, inputs) as artifact:
            if not artifact.done:
                work = artifact.path(layout.WORK)
                embedded = [path for found in self._sets for path in found.embeddings(work, context)]
                columns = (
                    PlainColumn(artifact.folder, layout.SIMILARITY),
                    PlainColumn(artifact.folder, layout.NEAREST_ROW),
                )
                task = _Nearest(self._catalog.folder, column, embedded, columns, self._device)
                context.run(task, self.parts, "comparing with the sets", KERNEL)
                context.executor.forget()
                without = sum(int((~map_array(path).any(axis=1)).sum()) for path in embedded) // self._views
                remove_folder(work)
                images = int(self._firsts[-1])
                artifact.finish({"samples": self._snapshot.rows, "images": images, "not_compared": without})
            return Neighbours(self._catalog, artifact.folder)

    def write_hashes(self, path: Path) -> Path:
        """Write the hashes of the sets, sorted: ENTRY [T], each hash with the first image that has it; return the file."""
        hashes = np.concatenate([found.hashes(self._context) for found in self._sets])
        rows = np.flatnonzero(has_hash(hashes))
        self._unhashed = (len(hashes) - len(rows)) // self._views
        entries = np.empty(len(rows), ENTRY)
        entries["high"], entries["low"] = hashes[rows].T
        entries["row"] = rows
        write_array(path, entries[np.lexsort([entries[name] for name in ("row", "low", "high")])])
        return path

    def tables(self, task: _Find) -> Iterator[pa.Table]:
        """Yield the rows that are dropped, part by part: AGAINST_SCHEMA; count them."""
        for found in self._context.map(task, self.parts, "writing", KERNEL):
            images, identical = found["number"] // self._views, found["identical"].tolist()
            self._hit[images] = True
            numbers = (np.searchsorted(self._firsts, images, side="right") - 1).tolist()
            self._samples.update(zip(numbers, identical, strict=True))
            names, places = [self._sets[number].name for number in numbers], self._places(images, numbers)
            reasons = [
                f"{'identical pixels' if same else 'near-duplicate'} in {name}"
                for same, name in zip(identical, names, strict=True)
            ]
            yield drop_table(
                {
                    "row": found["row"],
                    "reason": pa.array(reasons, pa.string()),
                    "similarity": found["similarity"].astype(np.float32),
                    "set": pa.array(names, pa.string()),
                    "mirrored": found["number"] % self._views == 1,
                    **{name: pa.array([place.get(name) for place in places], AGAINST_SCHEMA.field(name).type)
                       for name in ("file", "key", "number")},
                },
                AGAINST_SCHEMA,
            )  # fmt: skip

    def _places(self, images: npt.NDArray[np.int64], numbers: list[int]) -> list[dict[str, Any]]:
        places: list[dict[str, Any]] = [{}] * len(images)
        for number in set(numbers):
            at = np.flatnonzero(np.array(numbers) == number)
            found = self._sets[number].places(images[at] - self._firsts[number])
            for where, place in zip(at.tolist(), found, strict=True):
                places[where] = place
        return places

    def summary(self, survivors: Survivors, nearest: Neighbours | None, dropped: int) -> dict[str, Any]:
        judged, counts = 0, np.zeros(len(EPSILONS) + 1, np.int64)
        for part in self.parts:
            kept = survivors.keeps(part.span)
            judged += int(kept.sum())
            if nearest is not None:
                bands = np.searchsorted(np.array(EPSILONS), 1 - nearest.similarity[part.span][kept], side="right")
                counts += np.bincount(bands, minlength=len(counts))
        at_epsilon = zip(EPSILONS, np.cumsum(counts)[:-1].tolist(), strict=True)
        return {
            "samples": self._snapshot.rows,
            "judged": judged,
            "dropped": dropped,
            "dropped_identical": sum(count for (_, identical), count in self._samples.items() if identical),
            "dropped_near": sum(count for (_, identical), count in self._samples.items() if not identical),
            "kept": judged - dropped,
            "set_images_not_compared": max(self._unhashed, nearest.summary.get("not_compared", 0) if nearest else 0),
            "sets": [
                {
                    "set": found.name,
                    "images": found.count,
                    "images_found": int(self._hit[first : first + found.count].sum()),
                    "dropped_identical": self._samples[number, True],
                    "dropped_near": self._samples[number, False],
                }
                for number, (found, first) in enumerate(zip(self._sets, self._firsts.tolist(), strict=False))
            ],
            "epsilons": [{"epsilon": epsilon, "near": count} for epsilon, count in at_epsilon] * (nearest is not None),
        }


@dataclass(frozen=True, eq=False)
class _Nearest(Task[Part, None]):
    """Write the nearest image of the sets, and the similarity to it, for each row of a part: ties go to the lowest number."""

    catalog: Path  # its folder
    column: str
    embedded: Sequence[Path]  # embeddings of the sets, float16 [·, d]
    to: tuple[PlainColumn, PlainColumn]  # float64, int64 −1 where no cosine is positive
    device: str

    def files(self, item: Part) -> Sequence[Path]:
        return [column.path(item) for column in self.to]

    def run(self, item: Part, worker: Worker) -> None:
        x = Catalog.open(self.catalog).embedding(self.column, item)
        best, number = np.zeros(item.rows), np.full(item.rows, -1, np.int64)
        for first, assigner in self._blocks(worker):
            for start, chunk in row_chunks([x], CHUNK_ROWS):
                some = slice(start, start + len(chunk))
                labels, similarity = assigner(chunk)
                better = similarity > best[some]
                best[some][better], number[some][better] = similarity[better], first + labels[better]
        self.to[0].write(item, np.minimum(best, 1.0))
        self.to[1].write(item, number)

    def _blocks(self, worker: Worker) -> Iterable[tuple[int, Assigner]]:
        """Return the images in blocks, each with the number of its first image; a single block stays in the worker."""
        shapes = worker.cached(("shapes", *self.embedded), lambda: [map_array(path).shape for path in self.embedded])
        rows = max(1, BLOCK_BYTES // (4 * shapes[0][1]))
        if sum(shape[0] for shape in shapes) > rows:
            return self._assigners(rows)
        return worker.cached(("assigners", *self.embedded), lambda: [*self._assigners(rows)])

    def _assigners(self, rows: int) -> Iterator[tuple[int, Assigner]]:
        first = 0
        for block in _joined(self.embedded, rows):
            yield first, Assigner(unit_rows_on_grid(block.astype(np.float64)), device=self.device)
            first += len(block)


def _joined(paths: Sequence[Path], rows: int) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the rows of some files in blocks of at most `rows` rows."""
    held, count = list[npt.NDArray[np.float16]](), 0
    for path in paths:
        for _, chunk in row_chunks([map_array(path)], rows):
            if count + len(chunk) > rows:
                yield np.concatenate(held)
                held, count = [], 0
            held.append(chunk)
            count += len(chunk)
    if held:
        yield np.concatenate(held)


@dataclass(frozen=True, eq=False)
class _Find(Task[Part, npt.NDArray[Any]]):
    """Return the rows of a part that the sets hold, by row: _FOUND [·]."""

    catalog: Path  # its folder
    request: DedupRequest
    snapshot: Snapshot
    nearest: Path | None  # folder of the nearest images
    hashes: PartColumn | None  # of the pool
    entries: Path | None  # file of the hashes of the sets

    def run(self, item: Part, worker: Worker) -> npt.NDArray[Any]:
        catalog = Catalog.open(self.catalog)
        found = np.zeros(item.rows, _FOUND)
        found["row"], found["number"] = item.first_row + np.arange(item.rows), -1
        if self.nearest is not None:
            neighbours = Neighbours(catalog, self.nearest)
            near = neighbours.similarity[item.span] > 1 - (self.request.epsilon or 0)
            found["number"] = np.where(near, neighbours.row[item.span], -1)
            found["similarity"] = neighbours.similarity[item.span]
        if self.hashes is not None and self.entries is not None:
            entries = worker.cached(self.entries, partial(map_array, self.entries))
            hashes = np.array(self.hashes.read(item))
            same = find_sorted(entries, np.ascontiguousarray(entries["high"]), hashes.view(HASH)[:, 0])
            same[~has_hash(hashes)] = -1
            identical = same >= 0
            found["number"][identical], found["similarity"][identical] = same[identical], 1.0
            found["identical"] = identical
        survivors = Survivors(catalog, self.request.without, self.snapshot)
        return found[(found["number"] >= 0) & survivors.keeps(item.span)]
