"""One column of embeddings: rows of shards are embedded, and written part by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise, repeat
from time import perf_counter

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import embeddings_of, open_column, write_part
from tailwise.catalog.files import digest
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.encoders.encoder import Fault
from tailwise.errors import UserError, refuse_many
from tailwise.execution.base import Needs
from tailwise.requests import EmbedRequest
from tailwise.steps.embedding.read import ShardRows
from tailwise.steps.embedding.tasks import WINDOW, Description, Embed, Finished
from tailwise.steps.kept import kept_rows, take

JUDGED_SAMPLES = 10_000  # the share of rejects is checked from this number of samples on, and at the end of each part
ITEM_BATCHES = 16
BATCH_SIZES = {"cuda": 256, "cpu": 64}  # by default; enough to keep a GPU busy, and few enough for a CPU's caches
_EMBEDDED, _KEPT, _GONE = "embedded", "kept", "gone"  # rows; of a file that was replaced, where they are gone


@dataclass(frozen=True)
class ColumnReport:
    """Result of the embedding of one column.

    Attributes:
        column: its name.
        dimension: d.
        precision: that was computed in.
        backend: that computed.
        embedded: samples that got an embedding.
        lacking: samples that had none before.
        truncated: captions that are longer than the model reads.
        seconds: it took, without loading the encoder.
        samples: embedded or rejected in this time; others were finished before an interruption.
    """

    column: str
    dimension: int
    precision: str
    backend: str
    embedded: int
    lacking: int
    truncated: int
    seconds: float
    samples: int


@dataclass
class Column:
    """A column that is being made."""

    catalog: Catalog
    name: str
    modality: str  # "image" or "text"
    request: EmbedRequest  # names the encoder, and says how to load it
    made: Description  # of this side of the encoder

    def __post_init__(self) -> None:
        self._batch_size = self.request.batch_size or BATCH_SIZES.get(self.made.device, 64)
        made_by = digest([self.made.settings, self.made.dimension, self._batch_size])
        self._finished = Finished(self.catalog.embedding_folder(self.name), made_by)
        self._paths: list[str] = self.catalog.shards().column("path").to_pylist()
        self._tally = _Tally(self.request.max_rejected, self.modality)

    def open(self) -> None:
        """Create the column, unless it exists; raise a UserError if it is another encoder's."""
        made, encoder = self.made, self.request.encoder
        open_column(self.catalog, self.name, made.dimension, encoder, self.modality, made.settings, made.versions)

    def fill(self, lacking: list[Part], rejections: Rejections, context: Context) -> ColumnReport:
        """Embed the parts that an open column lacks; note in `rejections` what could not be embedded.

        Raises:
            UserError: a shard can't be read, or too little could be embedded.
        """
        pieces, started, embedded = self._pieces(lacking), perf_counter(), 0
        needs = Needs(device=self.request.device)
        slots = context.executor.slots(needs)
        task = Embed(
            self.catalog.folder,
            self.modality,
            self.request,
            self._batch_size,
            self.made.dimension,
            self._finished,
        )
        items = [rows for rows, how in pieces if how is _EMBEDDED]
        total = sum(rows.rows for rows, how in pieces if how is not _GONE)
        left = [window[0] for window in context.executor.left(task, [[item] for item in items])]
        windows = (left[at : at + WINDOW * slots : slots] for at in range(len(left)))
        results, expected = context.executor.map(task, windows, needs), set(left)

        def rows() -> Iterator[None]:
            """Embed everything; yield once for each sample."""
            nonlocal embedded
            by_part = {number: list(mine) for number, mine in groupby(pieces, key=lambda piece: piece[0].part)}
            for part in lacking:
                for item, how in (mine := by_part.get(part.number, [])):
                    if item in expected:
                        next(results)
                    if how is _EMBEDDED:
                        self._tally.add(item, *self._finished.read(item), self._paths[item.shard])
                    yield from repeat(None, item.rows if how is not _GONE else 0)
                self._tally.refuse_many()
                embedded += self._write(part, mine, rejections)

        for _ in context.progress(rows(), f"embedding {self.name}s", total):
            pass
        self._finished.close()
        if items and not embedded:
            raise UserError(f"not one of {total:,} samples got an {self.name} embedding: {self._tally.causes()}")
        settings = self.made.settings
        return ColumnReport(
            self.name,
            self.made.dimension,
            settings["precision"],
            settings["backend"],
            embedded,
            total,
            self._tally.truncated,
            perf_counter() - started,
            sum(item.rows for item in left),
        )

    def _pieces(self, parts: list[Part]) -> list[tuple[ShardRows, str]]:
        """Return the rows of some parts, at most ITEM_BATCHES batches of one shard each, in order, and what becomes of them."""
        wanted, size = {part.number: part for part in parts}, ITEM_BATCHES * self._batch_size
        table, replaced = self.catalog.shards(), self.catalog.replaced()
        shards = zip(*(table.column(name).to_pylist() for name in ("shard", "part", "rows")), strict=True)
        found = list[tuple[ShardRows, str]]()
        for number, members in groupby(shards, key=lambda shard: shard[1]):
            if (part := wanted.get(number)) is None:
                continue
            kept, first = kept_rows(self.catalog, self.name, part) >= 0, 0
            for shard, _, rows in members:
                ends = np.flatnonzero(np.diff(kept[first : first + rows])) + 1
                for start, stop in pairwise([0, *ends.tolist(), rows]):
                    how = _GONE if shard in replaced else _KEPT if kept[first + start] else _EMBEDDED
                    found += [
                        (ShardRows(shard, number, first + at, min(size, stop - at)), how)
                        for at in range(start, stop, size)
                    ]
                first += rows
        return found

    def _write(self, part: Part, pieces: list[tuple[ShardRows, str]], rejections: Rejections) -> int:
        """Write a part whose items are all finished; return how many of its rows have an embedding."""
        items = [rows for rows, how in pieces if how is _EMBEDDED]
        kept = kept_rows(self.catalog, self.name, part)
        vectors = embeddings_of(self.catalog, self.name)
        listed = layout.rejected_log(self.catalog.folder, layout.EMBED_LOG, self.name, part.name)

        def chunks() -> Iterator[npt.NDArray[np.float16]]:
            with rejections.writer(listed) as log:  # on disk when the last chunk is taken: before the part's marker
                for item, how in pieces:
                    if how is not _EMBEDDED:
                        yield take(vectors, kept[item.first : item.first + item.rows])
                        continue
                    for key, fault in self._finished.read(item)[0]:
                        log.add("embed", fault.reason, self._paths[item.shard], key, fault.detail)
                    yield self._finished.rows(item)

        made = self.made
        embedded = write_part(self.catalog, self.name, part, made.dimension, chunks(), versions=made.versions)
        self._finished.forget(items)
        return embedded


class _Tally:
    """Counts of samples, and of those that could not be embedded."""

    def __init__(self, max_rejected: float, modality: str) -> None:
        self.truncated = 0
        self._max_rejected, self._what = max_rejected, {"image": "images", "text": "captions"}[modality]
        self._seen = 0
        self._reasons = Counter[str]()
        self._example = ""

    def add(self, item: ShardRows, faults: list[tuple[str, Fault]], truncated: int, path: str) -> None:
        """Count finished rows of a shard; stop with a UserError if too many of many samples were rejected."""
        self._seen += item.rows
        self.truncated += truncated
        self._reasons.update(fault.reason for _, fault in faults)
        if faults and not self._example:
            key, fault = faults[0]
            self._example = f"the first is {key} of {path} ({fault.detail})"
        if self._seen >= JUDGED_SAMPLES:
            self.refuse_many()

    def refuse_many(self) -> None:
        """Stop with a UserError if too many samples were rejected."""
        what = f"{{}} {self._what}{{}} can't be embedded"
        causes = f"{self.causes()}; finished rows are kept" if self._reasons else ""
        refuse_many(self._reasons.total(), self._seen, self._max_rejected, what, causes)

    def causes(self) -> str:
        """Return the reasons with their counts, and the first case."""
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self._reasons.most_common())
        return f"{counts}; {self._example}"
