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
from tailwise.catalog.catalog import Catalog, Part, Snapshot
from tailwise.catalog.files import create_array, map_array
from tailwise.catalog.scores import repetition, score_column
from tailwise.context import Context
from tailwise.execution.base import KERNEL, Task, Worker
from tailwise.kernels.grid import row_chunks
from tailwise.kernels.keyed import permute_range, stream_key
from tailwise.kernels.scores import clip_loss, cosines, gram, greatest_cosines, target_norms
from tailwise.mapped import release_pages
from tailwise.steps.importing.join import Batch, join_values, read_numbers
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

    def path(self, part: Part) -> Path:
        """The file of one part."""
        return score_column(self.folder).path(part)

    def write(self, part: Part, values: Rows) -> None:
        """Writes one part, as float32."""
        score_column(self.folder).write(part, np.asarray(values).astype(np.float32))


PartScores = Callable[[ScoreWork, Part, Worker], Rows]


@dataclass(frozen=True, eq=False)
class _OfPart(Task[Part, None]):
    """Write the score of a part."""

    work: ScoreWork
    scores: PartScores

    def files(self, item: Part) -> Sequence[Path]:
        return (self.work.path(item),)

    def run(self, item: Part, worker: Worker) -> None:
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            self.work.write(item, self.scores(self.work, item, worker))


def by_part(scores: PartScores) -> Callable[[ScoreWork], None]:
    """Return a maker that makes a score part by part. `scores` is a function of a module, or a `partial` of one."""

    def make(work: ScoreWork) -> None:
        task = _OfPart(replace(work, context=Context()), scores)
        work.context.run(task, work.catalog.parts(work.snapshot), work.name, KERNEL)

    return make


# --- from the samples -------------------------------------------------------------------------------------------------


def numbers(table: pa.Table, column: str) -> Scores:
    """A numeric column; NaN for null."""
    values: Scores = table.column(column).cast(pa.float64(), safe=False).to_numpy()
    return values


def of_samples(columns: Sequence[str], scores: Callable[[pa.Table], Scores]) -> Callable[[ScoreWork], None]:
    """Return a maker of a score from columns of the samples."""
    return by_part(partial(_of_samples, columns=columns, scores=scores))


def _of_samples(
    work: ScoreWork,
    part: Part,
    worker: Worker,  # noqa: ARG001
    *,
    columns: Sequence[str],
    scores: Callable[[pa.Table], Scores],
) -> Rows:
    return scores(work.catalog.samples(part, columns))


def caption_characters(samples: pa.Table) -> Scores:
    """Unicode code points of each caption."""
    return np.asarray(pc.utf8_length(samples.column("caption")).to_numpy(), np.float64)


def caption_words(samples: pa.Table) -> Scores:
    """Words of each caption: what white space separates."""
    return np.array([len(caption.split()) for caption in samples.column("caption").to_pylist()], np.float64)


def pixels(samples: pa.Table) -> Scores:
    """Width × height."""
    return numbers(samples, "width") * numbers(samples, "height")


def aspect_ratio(samples: pa.Table) -> Scores:
    """Longer / shorter side."""
    width, height = numbers(samples, "width"), numbers(samples, "height")
    longer, shorter = np.maximum(width, height), np.minimum(width, height)
    return np.where(shorter > 0, longer / np.where(shorter > 0, shorter, 1.0), np.nan)


def numeric_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file that hold numbers."""
    schema = pq.read_schema(path)
    return [item.name for item in schema if pa.types.is_integer(item.type) or pa.types.is_floating(item.type)]


def column_of_samples(work: ScoreWork, part: Part, worker: Worker) -> Scores:  # noqa: ARG001
    """The column of the score's name, which came with the samples."""
    if work.name not in numeric_columns(work.catalog.samples_path(part.number)):  # its sidecar had no such column
        return np.full(part.rows, np.nan)
    return numbers(work.catalog.samples(part, [work.name]), work.name)


# --- from embeddings --------------------------------------------------------------------------------------------------


def clip_score(work: ScoreWork, part: Part, worker: Worker) -> Scores:  # noqa: ARG001
    """Cosine of image and text."""
    image, text = (row_chunks([work.catalog.embedding(column, part)], CHUNK_ROWS) for column in ("image", "text"))
    return np.concatenate([cosines(x, y) for (_, x), (_, y) in zip(image, text, strict=True)])


def normsim(work: ScoreWork, part: Part, worker: Worker) -> Scores:
    """Return the norms of the cosines to a target set."""
    path, norm = work.options["target"], work.options["norm"]
    scores = worker.cached((path, norm), lambda: NORMS[norm](Target(path)))
    return np.concatenate(
        [scores(chunk) for _, chunk in row_chunks([work.catalog.embedding("image", part)], CHUNK_ROWS)]
    )


def _euclidean(target: Target) -> Callable[[Rows], Scores]:
    target_gram = gram(target.pieces())
    return lambda chunk: target_norms(chunk, target_gram)


def _greatest(target: Target) -> Callable[[Rows], Scores]:
    return lambda chunk: greatest_cosines(chunk, target.pieces())


NORMS: dict[str, Callable[[Target], Callable[[Rows], Scores]]] = {"2": _euclidean, "inf": _greatest}


class _Pairs:
    """The samples that have both embeddings, by number, for random access."""

    def __init__(self, work: ScoreWork, folder: Path) -> None:
        self.parts = work.catalog.parts(work.snapshot)
        self.columns = [work.catalog.embedding_parts(column, work.snapshot) for column in ("image", "text")]
        self.starts = np.array([part.first_row for part in self.parts])
        rows = create_array(folder / "rows.npy", (work.snapshot.rows,), np.int64)
        self.count = 0
        for image, text, part in zip(*self.columns, self.parts, strict=True):
            chunks = zip(row_chunks([image], CHUNK_ROWS), row_chunks([text], CHUNK_ROWS), strict=True)
            for (start, x), (_, y) in chunks:
                both = part.first_row + start + np.flatnonzero(x.any(axis=1) & y.any(axis=1))
                rows[self.count : self.count + len(both)] = both
                self.count += len(both)
        self.rows = rows[: self.count]

    def embeddings(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Image and text embeddings of some rows, ascending: float16 [n, d] each."""
        bounds = np.searchsorted(rows, [*self.starts, np.iinfo(np.int64).max])
        gathered = []
        for blocks in self.columns:
            target = np.empty((len(rows), blocks[0].shape[1]), np.float16)
            for block, start, low, high in zip(blocks, self.starts, bounds[:-1], bounds[1:], strict=True):
                target[low:high] = block[rows[low:high] - start]
                release_pages(block)
            gathered.append(target)
        return gathered[0], gathered[1]


def cliploss(work: ScoreWork) -> None:
    """CLIPLoss, averaged over batches of random samples: consecutive places of a keyed permutation, another one in each repetition."""
    if not all(work.path(part).exists() for part in work.catalog.parts(work.snapshot)):
        _average_clip_losses(work)
    for path in work.folder.glob(repetition(work.folder, "*").name):
        path.unlink()


def _average_clip_losses(work: ScoreWork) -> None:
    with scratch(work.folder / layout.PAIRS) as folder:
        pairs = _Pairs(work, folder)
        batches = -(-pairs.count // work.options["batch_size"])
        # A single batch holds all pairs, whatever their order.
        repetitions = work.options["repetitions"] if batches > 1 else 1
        steps = iter(work.context.progress(range(repetitions * batches), "cliploss: batches", repetitions * batches))
        paths = [repetition(work.folder, number) for number in range(repetitions)]
        for number, path in enumerate(paths):
            if path.exists():  # of an interrupted run
                continue
            key = stream_key(work.options["seed"], "cliploss batches", number)
            with replacing(path) as temporary:
                losses = create_array(temporary, (work.snapshot.rows,), np.float32)
                losses[:] = np.nan
                for batch in range(batches):
                    next(steps)
                    first, end = (edge * pairs.count // batches for edge in (batch, batch + 1))
                    rows = np.sort(pairs.rows[permute_range(key, pairs.count, first, end - first)])
                    losses[rows] = clip_loss(*pairs.embeddings(rows), work.options["temperature"])
                del losses
        for _ in steps:  # ends the bar
            pass
    for part in work.catalog.parts(work.snapshot):
        total = np.zeros(part.rows)
        for path in paths:
            total += map_array(path)[part.span]
        work.write(part, total / repetitions)


# --- from a file ------------------------------------------------------------------------------------------------------


def column_of_file(work: ScoreWork) -> dict[str, int]:
    """Write the column of the score's name in a file, joined by uid or key; return how many keys it has, and how many match no sample."""
    path = Path(work.options["file"]).expanduser()
    identifier, batches = read_numbers(path, work.name, "scores")
    with scratch(work.folder / layout.JOINING) as folder:
        joined = create_array(folder / "score.npy", (work.snapshot.rows,), np.float32)
        joined[:] = np.nan
        keys = 0

        def counted() -> Iterator[Batch]:
            nonlocal keys
            for batch in work.context.progress(batches, f"joining {work.name}"):
                keys += len(batch[0])
                yield batch

        place, bound = folder / "keys", work.options["max_rejected"]
        unknown = join_values(work.catalog, work.snapshot, identifier, counted(), joined, place, "score", bound)
        for part in work.catalog.parts(work.snapshot):
            work.write(part, joined[part.span])
    return {"keys": keys, "keys_without_sample": unknown}
