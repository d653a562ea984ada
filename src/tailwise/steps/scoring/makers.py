"""How scores are made: from samples, from embeddings, from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailwise.catalog import layout
from tailwise.catalog.captions import find_captions
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.columns import PartColumn
from tailwise.catalog.files import create_array, map_array, read_array
from tailwise.catalog.scores import repetition, score_column
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply, Task, Worker
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.keyed import permute_range, stream_key
from tailwise.kernels.scores import TargetGram, clip_loss, cosines, gram
from tailwise.mapped import release_pages
from tailwise.steps.importing.join import fill, refuse_other_pool
from tailwise.steps.importing.listed import SampleList, check_matched, has_columns, read_list
from tailwise.steps.scoring.head import read_head
from tailwise.steps.scoring.target import Target
from tailwise.storage.local import replacing, scratch

CHUNK_ROWS = 8192
Rows = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoreWork:
    """A score that is being made."""

    catalog: Catalog
    snapshot: Snapshot
    folder: Path
    name: str
    options: Mapping[str, Any]
    context: Context

    @property
    def parts(self) -> list[Part]:
        """Parts of the snapshot."""
        return self.catalog.parts(self.snapshot)

    @property
    def paired(self) -> tuple[str, str]:
        """Columns of image and text embeddings, of a score that has both."""
        return self.options["image"], self.options["text"]

    @property
    def column(self) -> PartColumn:
        """Column of the score: float32."""
        return score_column(self.folder)


@dataclass(frozen=True)
class ScoredPart:
    """A part whose score is being made, in a worker."""

    work: ScoreWork
    part: Part
    worker: Worker

    def samples(self, column: str) -> pa.ChunkedArray:
        """Return a column of the samples."""
        return self.work.catalog.samples(self.part, [column]).column(0)

    def captions(self) -> pa.ChunkedArray | pa.Array:
        """Return the captions: the joined ones that the options name, and samples' own where there are none."""
        own, joined = self.samples("caption"), find_captions(self.work.catalog, self.work.options["captions"])
        if joined is None:
            return own
        rows = np.arange(self.part.first_row, self.part.span.stop)
        return pc.coalesce(pa.array(joined.of(rows), pa.string()), own.combine_chunks())

    def numbers(self, column: str) -> Scores:
        """Return a numeric column of the samples; NaN for null."""
        return np.asarray(self.samples(column).cast(pa.float64(), safe=False).to_numpy())

    def embeddings(self, column: str) -> Iterator[Rows]:
        """Yield the embeddings, float16 [n, d], a chunk at a time."""
        return (chunk for _, chunk in row_chunks([self.work.catalog.embedding(column, self.part)], CHUNK_ROWS))


PartScores = Callable[[ScoredPart], Rows]


@dataclass(frozen=True, eq=False)
class _OfPart(Task[Part, None]):
    """Write the score of a part."""

    work: ScoreWork
    scores: PartScores

    def files(self, item: Part) -> Sequence[Path]:
        return (self.work.column.path(item),)

    def run(self, item: Part, worker: Worker) -> None:
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            scores = self.scores(ScoredPart(self.work, item, worker)).astype(np.float32)
        self.work.column.write(item, scores)


def by_part(scores: PartScores) -> Callable[[ScoreWork], None]:
    """Return a maker that makes a score part by part. `scores` is a function of a module, or a `partial` of one."""
    return lambda work: work.context.run(
        _OfPart(replace(work, context=Context()), scores), work.parts, work.name, KERNEL
    )


# --- from the samples -------------------------------------------------------------------------------------------------


def caption_characters(of: ScoredPart) -> Scores:
    """Return the number of Unicode code points of each caption."""
    return np.asarray(pc.utf8_length(of.captions()).to_numpy(), np.float64)


def caption_words(of: ScoredPart) -> Scores:
    """Return the number of words of each caption: what white space separates."""
    return np.array([len(caption.split()) for caption in of.captions().to_pylist()], np.float64)


def pixels(of: ScoredPart) -> Scores:
    """Return width × height."""
    return of.numbers("width") * of.numbers("height")


def aspect_ratio(of: ScoredPart) -> Scores:
    """Return longer / shorter side."""
    width, height = of.numbers("width"), of.numbers("height")
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    return np.where(shorter > 0, longer / np.where(shorter > 0, shorter, 1.0), np.nan)


def numeric_columns(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file that hold numbers."""
    schema = pq.read_schema(path)
    return [item.name for item in schema if pa.types.is_integer(item.type) or pa.types.is_floating(item.type)]


def column_of_samples(of: ScoredPart) -> Scores:
    """Return the column of the score's name, which came with the samples; NaN for a part without it."""
    if of.work.name not in numeric_columns(of.work.catalog.samples_path(of.part.number)):
        return np.full(of.part.rows, np.nan)
    return of.numbers(of.work.name)


# --- from embeddings --------------------------------------------------------------------------------------------------


def clip_score(of: ScoredPart) -> Scores:
    """Return the cosine of image and text (CLIPScore, Hessel et al. 2021, arXiv 2104.08718)."""
    return np.concatenate([cosines(*pair) for pair in zip(*map(of.embeddings, of.work.paired), strict=True)])


def normsim(of: ScoredPart) -> Scores:
    """Return the norms of the cosines to a target set (NormSim, Wang et al. 2024, arXiv 2405.19547)."""
    norm = NORMS[of.work.options["norm"]]
    scores = of.worker.cached(of.work.folder, lambda: norm(Target(of.work.options["target"])))
    return np.concatenate([scores(chunk) for chunk in of.embeddings(of.work.options["image"])])


def _euclidean(target: Target) -> Callable[[Rows], Scores]:
    return TargetGram(gram(target.pieces())).norms


def _greatest(target: Target) -> Callable[[Rows], Scores]:
    from tailwise.kernels.greatest import greatest_cosines  # noqa: PLC0415  (imports torch)

    return lambda chunk: greatest_cosines(chunk, target.pieces())


NORMS: dict[str, Callable[[Target], Callable[[Rows], Scores]]] = {"2": _euclidean, "inf": _greatest}


def near_target(work: ScoreWork) -> dict[str, int]:
    """Write how many target rows have the centroid of each sample's cluster as their nearest; return how many clusters have any."""
    from tailwise.kernels.assign import count_nearest  # noqa: PLC0415  (imports torch)

    clustering = Clustering.open(work.catalog, work.options["clustering"])
    counts = count_nearest(clustering.centroids, Target(work.options["target"]).pieces())
    of_label = np.append(counts, np.nan).astype(np.float32)  # label −1: no cluster
    for part in work.parts:
        work.column.write(part, of_label[np.maximum(clustering.labels.read(part), -1)])
    return {"clusters": len(counts), "clusters_near": int(np.count_nonzero(counts))}


def _pairs(catalog: Catalog, columns: Sequence[str], part: Part) -> npt.NDArray[np.int64]:
    """Return the rows of a part that have both embeddings."""
    image, text = (row_chunks([catalog.embedding(column, part)], CHUNK_ROWS) for column in columns)
    chunks = [
        part.first_row + at + np.flatnonzero(x.any(axis=1) & y.any(axis=1))
        for (at, x), (_, y) in zip(image, text, strict=True)
    ]
    return np.concatenate([np.empty(0, np.int64), *chunks])


@dataclass(frozen=True, eq=False)
class _BatchLosses(Task[int, tuple[Rows, Scores]]):
    """Return the rows of a batch of random pairs, ascending, and their losses. Item: the number of the batch."""

    work: ScoreWork
    pairs: Path
    count: int
    batches: int
    repetition: int

    def run(self, item: int, worker: Worker) -> tuple[Rows, Scores]:
        pairs, columns = worker.cached(self.pairs, self._open)
        key = stream_key(self.work.options["seed"], "cliploss batches", self.repetition)
        first, end = (edge * self.count // self.batches for edge in (item, item + 1))
        rows = np.sort(pairs[permute_range(key, self.count, first, end - first)])
        image, text = (self._gather(blocks, rows) for blocks in columns)
        return rows, clip_loss(image, text, self.work.options["temperature"])

    def _open(self) -> tuple[Rows, list[list[npt.NDArray[np.float16]]]]:
        catalog, snapshot = self.work.catalog, self.work.snapshot
        return read_array(self.pairs), [catalog.embedding_parts(column, snapshot) for column in self.work.paired]

    def _gather(self, blocks: list[npt.NDArray[np.float16]], rows: Rows) -> npt.NDArray[np.float16]:
        target = np.empty((len(rows), blocks[0].shape[1]), np.float16)
        for block, part in zip(blocks, self.work.parts, strict=True):
            low, high = np.searchsorted(rows, (part.span.start, part.span.stop))
            target[low:high] = block[rows[low:high] - part.first_row]
            release_pages(block)
        return target


def cliploss(work: ScoreWork) -> None:
    """Write CLIPLoss (Wang et al. 2024, arXiv 2405.19547), averaged over batches of random samples.

    A batch is consecutive places of a keyed permutation, another one in each repetition.
    """
    if not all(work.column.path(part).exists() for part in work.parts):
        _average_clip_losses(work)
    for path in list(work.folder.glob(repetition(work.folder, "*").name)):
        path.unlink()


def _average_clip_losses(work: ScoreWork) -> None:
    context, address = work.context, replace(work, context=Context())
    with scratch(work.folder / layout.PAIRS) as folder:
        with replacing(folder / "rows.npy") as temporary:
            pairs, count = create_array(temporary, (work.snapshot.rows,), np.int64), 0
            for rows in context.executor.map(Apply(partial(_pairs, work.catalog, work.paired)), work.parts, KERNEL):
                pairs[count : count + len(rows)] = rows
                count += len(rows)
            del pairs
        batches = -(-count // work.options["batch_size"])
        # A single batch holds all pairs, whatever their order.
        repetitions = work.options["repetitions"] if batches > 1 else 1
        paths = [repetition(work.folder, number) for number in range(repetitions)]
        for number, path in enumerate(paths):
            if path.exists():  # of an interrupted run
                continue
            task = _BatchLosses(address, folder / "rows.npy", count, batches, number)
            with replacing(path) as temporary:
                losses = create_array(temporary, (work.snapshot.rows,), np.float32)
                losses[:] = np.nan
                for rows, found in context.map(task, range(batches), "cliploss: batches", KERNEL):
                    losses[rows] = found
                del losses
    for part in work.parts:
        total = sum((map_array(path)[part.span] for path in paths), np.zeros(part.rows))
        work.column.write(part, (total / repetitions).astype(np.float32))


def head(of: ScoredPart) -> Scores:
    """Return the output of linear layers on the embeddings."""
    options = of.work.options
    model = of.worker.cached(of.work.folder, lambda: read_head(Path(options["head"]), options["activation"]))
    return np.concatenate([model(chunk) for chunk in of.embeddings(options["image"])])


# --- from a file ------------------------------------------------------------------------------------------------------


def scores_of_file(work: ScoreWork) -> dict[str, Any]:
    """Write the scores that a file gives by names of samples; return what matched: see `check_matched`, and samples_matched."""
    path, options, column = Path(work.options["file"]).expanduser(), work.options, work.options["column"]
    if column and not has_columns(path):
        raise UserError(f"`column` {column} does nothing with {path}: it has no columns")
    listed = SampleList(path, "scores", options["match"] or None, (column or work.name) if has_columns(path) else None)
    if listed.counted:
        raise UserError(f"{path} holds no scores: give a table, .json {{name: score}}, or .npy of dtype u8,u8,f4")
    with scratch(work.folder / layout.JOINING, own=True) as folder:
        joined = create_array(folder / "score.npy", (work.snapshot.rows,), np.float32)
        joined[:] = np.nan
        matched = read_list(work.catalog, work.snapshot, listed, folder, work.context.progress)
        kind, index = matched.kind, matched.index
        fill(work.catalog, matched, joined, "score")
        refuse_other_pool(kind, index, joined, "score", options["max_rejected"])
        scored = int((~np.isnan(joined)).sum())
        figures = {"names": index.distinct, "names_matched": index.matched, "samples_matched": scored}
        check_matched(options["strict"], {**figures, "example": index.example}, str(path))
        for part in work.parts:
            work.column.write(part, joined[part.span])
    return {"matched_by": kind, **figures}
