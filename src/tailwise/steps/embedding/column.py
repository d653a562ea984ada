"""One column of embeddings: what is lacking of it, finished shard by shard, and written part by part."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog, Part
from tailwise.catalog.embeddings import open_column, write_part
from tailwise.catalog.files import digest
from tailwise.catalog.rejections import Rejections
from tailwise.context import Context
from tailwise.encoders import Encoder
from tailwise.errors import UserError, refuse_many
from tailwise.execution.local import default_workers
from tailwise.extras import versions
from tailwise.requests import EncoderRequest
from tailwise.steps.embedding.read import ShardRows
from tailwise.steps.embedding.shards import Done, Finished, Step, Work, embed_on_devices, embed_shards

JUDGED_SAMPLES = 10_000  # the share of rejects is checked from this number of samples on, and at the end of each part
_PACKAGES = ("torch", "pillow", "numpy")


@dataclass(frozen=True)
class Limits:
    """Limits of a run.

    Attributes:
        batch_size: rows.
        max_rejected: share of samples.
        workers: processes that read and decode; None for one a processor.
    """

    batch_size: int
    max_rejected: float
    workers: int | None


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


class ColumnTask:
    """The making of one column."""

    def __init__(
        self,
        catalog: Catalog,
        column: str,
        modality: str,
        encoder: Encoder,
        loading: EncoderRequest,
        devices: list[torch.device],
        limits: Limits,
    ) -> None:
        """Looks at the encoder; writes nothing.

        Args:
            catalog: whose column.
            column: its name.
            modality: "image" or "text"; the encoder has this side.
            encoder: loaded on the first device.
            loading: how other devices load it.
            devices: that it runs on.
            limits: what it may take.
        """
        self._catalog, self._column, self._encoder, self._limits = catalog, column, encoder, limits
        self._loading, self._devices, self._modality = loading, devices, modality
        self._dimension = _dimension(encoder, modality)
        self._versions = versions((*_PACKAGES, *encoder.packages))
        settings = {
            **encoder.identity,
            "preprocessing": dict(encoder.sides[modality].preprocessing),
            "precision": encoder.precision,
            "backend": encoder.sides[modality].backend,
        }
        self._settings: Mapping[str, Any] = json.loads(json.dumps(settings))
        self._made_by = digest([self._settings, self._dimension])
        self._paths: list[str] = catalog.shards().column("path").to_pylist()
        self._tally = _Tally(limits.max_rejected, modality)

    def open(self) -> None:
        """Create the column, unless it exists.

        Raises:
            UserError: it is another encoder's.
        """
        name, settings = self._encoder.name, self._settings
        open_column(self._catalog, self._column, self._dimension, name, self._modality, settings, self._versions)

    def run(self, lacking: list[Part], rejections: Rejections, context: Context) -> ColumnReport:
        """Embeds these parts of an open column.

        Args:
            lacking: parts without the column.
            rejections: takes what could not be embedded.
            context: runs the tasks and shows progress.

        Raises:
            UserError: a shard can't be read, or too little could be embedded.
        """
        finished = Finished(self._catalog, self._column, self._made_by)
        shards = _shards(self._catalog, lacking)
        done = {shard.shard for shard in shards if finished.find(shard)}
        started, samples, embedded = time.perf_counter(), 0, 0
        queue = _Queue(lacking, shards)
        with closing(_meter(context, f"embedding {self._column}s", sum(shard.rows for shard in shards))) as meter:
            for step in self._steps(shards, done):
                _advance(meter, step.rows)
                if step.finished is not None:
                    samples += 0 if step.finished.shard in done else step.finished.rows
                    self._tally.add(finished.get(step.finished), self._paths)
                for part, mine in queue.completed(step.finished):
                    self._tally.refuse_many()
                    embedded += self._write(part, mine, finished, rejections)
            _advance(meter, 1)  # past the end, so that the bar goes
        finished.close()
        total = sum(part.rows for part in lacking)
        if total and not embedded:
            raise UserError(f"not one of {total:,} samples got an {self._column} embedding: {self._tally.causes()}")
        return ColumnReport(
            self._column,
            self._dimension,
            self._encoder.precision,
            self._encoder.sides[self._modality].backend,
            embedded,
            total,
            self._tally.truncated,
            time.perf_counter() - started,
            samples,
        )

    def _steps(self, shards: list[ShardRows], done: set[int]) -> Iterator[Step]:
        """Batches of all shards; those that were finished before an interruption come first, as one."""
        yield Step(0, None)  # parts without rows are complete at once
        yield from (Step(shard.rows, shard) for shard in shards if shard.shard in done)
        left = [shard for shard in shards if shard.shard not in done]
        if not left:
            return
        several = len(self._devices) > 1
        workers = self._limits.workers or (max(1, default_workers() // len(self._devices)) if several else None)
        work = Work(
            self._catalog.folder,
            self._column,
            self._modality,
            left,
            self._limits.batch_size,
            workers,
            self._dimension,
            self._made_by,
        )
        if several:
            yield from embed_on_devices(work, self._encoder.name, self._loading, self._devices)
        else:
            yield from embed_shards(work, self._encoder)

    def _write(self, part: Part, shards: list[ShardRows], finished: Finished, rejections: Rejections) -> int:
        """Writes a part whose shards are all finished; returns how many of its rows have an embedding."""
        listed = layout.rejected_log(self._catalog.folder, layout.EMBED_LOG, self._column, part.name)

        def chunks() -> Iterator[npt.NDArray[np.float16]]:
            with rejections.writer(listed) as log:  # on disk when the last chunk is taken: before the part's marker
                for shard in shards:
                    for _, key, fault in finished.get(shard).faults:
                        log.add("embed", fault.reason, self._paths[shard.shard], key, fault.detail)
                    yield finished.rows(shard)

        embedded = write_part(self._catalog, self._column, part, self._dimension, chunks(), versions=self._versions)
        finished.forget(shards)
        return embedded


class _Queue:
    """Parts that wait for their shards, in order."""

    def __init__(self, parts: list[Part], shards: list[ShardRows]) -> None:
        self._parts = list(reversed(parts))
        self._members = {number: list(mine) for number, mine in groupby(shards, key=lambda shard: shard.part)}
        self._left = {number: len(mine) for number, mine in self._members.items()}

    def completed(self, shard: ShardRows | None) -> Iterator[tuple[Part, list[ShardRows]]]:
        """The parts that are complete now that this shard is finished, with their shards."""
        if shard is not None:
            self._left[shard.part] -= 1
        while self._parts and not self._left.get(self._parts[-1].number, 0):
            part = self._parts.pop()
            yield part, self._members.get(part.number, [])


class _Tally:
    """Counts of samples, and of those that could not be embedded."""

    def __init__(self, max_rejected: float, modality: str) -> None:
        self.truncated = 0
        self._max_rejected, self._what = max_rejected, {"image": "images", "text": "captions"}[modality]
        self._seen = 0
        self._reasons = Counter[str]()
        self._example = ""

    def add(self, done: Done, paths: list[str]) -> None:
        """Counts a finished shard.

        Raises:
            UserError: too many of many samples were rejected.
        """
        self._seen += done.shard.rows
        self.truncated += done.truncated
        self._reasons.update(fault.reason for _, _, fault in done.faults)
        if done.faults and not self._example:
            _, key, fault = done.faults[0]
            self._example = f"the first is {key} of {paths[done.shard.shard]} ({fault.detail})"
        if self._seen >= JUDGED_SAMPLES:
            self.refuse_many()

    def refuse_many(self) -> None:
        """Stops where too many samples were rejected.

        Raises:
            UserError: so it is.
        """
        what = f"{{}} {self._what}{{}} can't be embedded"
        causes = f"{self.causes()}; finished shards are kept" if self._reasons else ""
        refuse_many(self._reasons.total(), self._seen, self._max_rejected, what, causes)

    def causes(self) -> str:
        """Reasons with their counts, and the first case."""
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self._reasons.most_common())
        return f"{counts}; {self._example}"


def _shards(catalog: Catalog, parts: list[Part]) -> list[ShardRows]:
    """The shards of these parts that have rows, in order."""
    wanted = {part.number for part in parts}
    table = catalog.shards()
    numbers, rows = table.column("part").to_pylist(), table.column("rows").to_pylist()
    found = []
    for part, members in groupby(range(len(rows)), key=lambda shard: numbers[shard]):
        first = 0
        for shard in members:
            if part in wanted and rows[shard]:
                found.append(ShardRows(shard, part, first, rows[shard]))
            first += rows[shard]
    return found


def _dimension(encoder: Encoder, modality: str) -> int:
    """The width of the rows of one side, by one made-up sample."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(stream, "PNG")
    inputs = encoder.sides[modality].prepare([stream.getvalue() if modality == "image" else "a photo"])
    if inputs.faults:
        raise UserError(f"{encoder.name} takes no {modality}: {inputs.faults[0].detail}")
    return int(encoder.embed(modality, inputs.tensors).shape[1])


def _meter(context: Context, description: str, total: int) -> Generator[int, None, None]:
    """Counts samples: each that is taken moves the bar."""
    yield from context.progress(range(total), description, total)


def _advance(meter: Iterator[int], rows: int) -> None:
    for _ in range(rows):
        next(meter, None)
