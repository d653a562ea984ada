"""Tasks of an embedding: describe the encoder, and embed some rows of a shard."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tailwise.catalog import layout
from tailwise.catalog.embeddings import normalise_rows
from tailwise.catalog.files import read_array, read_json, write_array, write_json
from tailwise.devices import find_device
from tailwise.encoders import Encoder, load_encoder
from tailwise.encoders.encoder import Fault
from tailwise.errors import DamagedError, UserError
from tailwise.execution.base import Task, Worker
from tailwise.extras import versions
from tailwise.requests import EmbedRequest
from tailwise.steps.embedding.read import AHEAD_BATCHES, Batch, ShardRows, read_batches
from tailwise.storage.local import remove_folder

MAX_WORKERS = 16  # processes that read for one device, by default
WINDOW = AHEAD_BATCHES * MAX_WORKERS + 4  # items whose batches a device may have under way, of at least one batch each
NO_NUMBERS = "no embedding from the encoder"
_PACKAGES = ("torch", "pillow", "numpy")
_Item = TypeVar("_Item")


def load_once(request: EmbedRequest, worker: Worker) -> Encoder:
    """Return the encoder on the device of a worker."""

    def load() -> Encoder:
        return load_encoder(request.encoder, request, find_device(worker.device or request.device, any_kind=True))

    return worker.cached(request, load)


@dataclass(frozen=True)
class Description:
    """One side of an encoder."""

    device: str  # kind of the device that it runs on
    settings: Mapping[str, Any]  # decide the rows, as JSON values; "precision" and "backend" are among them
    dimension: int  # width d of the rows
    versions: Mapping[str, str]  # of the packages


@dataclass(frozen=True)
class Describe(Task[Sequence[str], dict[str, Description]]):
    """Describe the sides of an encoder where it runs."""

    in_each_part = True
    request: EmbedRequest  # names the encoder, and says how to load it

    def run(self, item: Sequence[str], worker: Worker) -> dict[str, Description]:
        """Return the description of each modality, or raise a UserError if the encoder lacks one."""
        encoder = load_once(self.request, worker)
        for modality in item:
            if modality not in encoder.sides:
                raise UserError(f"{encoder.name} has no {modality} side: give `column` {' or '.join(encoder.sides)}")
        return {modality: _description(encoder, modality) for modality in item}


def _description(encoder: Encoder, modality: str) -> Description:
    side = encoder.sides[modality]
    settings = {
        **encoder.identity,
        "preprocessing": dict(side.preprocessing),
        "precision": encoder.precision,
        "backend": side.backend,
    }
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(stream, "PNG")
    inputs = side.prepare([stream.getvalue() if modality == "image" else "a photo"])
    if inputs.faults:
        raise UserError(f"{encoder.name} takes no {modality}: {inputs.faults[0].detail}")
    dimension = int(encoder.embed(modality, inputs.tensors).shape[1])
    found = versions((*_PACKAGES, *encoder.packages))
    return Description(encoder.device.type, json.loads(json.dumps(settings)), dimension, found)


@dataclass(frozen=True)
class Finished:
    """Embedded rows whose part is not complete: two files for each item, the marker last."""

    folder: Path  # of the column
    made_by: str  # hash of all that decides the rows and the items; those of other settings are kept until the column is complete

    @property
    def _root(self) -> Path:
        return self.folder / layout.UNFINISHED

    def _path(self, item: ShardRows) -> Path:
        return self._root / self.made_by / f"{layout.SHARD}{item.shard:08d}-{item.first:08d}{layout.ARRAY}"

    def marker(self, item: ShardRows) -> Path:
        """Return the file that is written last."""
        return layout.marker(self._path(item))

    def write(
        self, item: ShardRows, rows: npt.NDArray[np.float16], faults: Sequence[tuple[str, Fault]], truncated: int
    ) -> None:
        """Write rows [n, d], (key, fault) of each sample without embedding, and the number of captions that are too long."""
        write_array(self._path(item), rows)
        listed = [[key, fault.reason, fault.detail] for key, fault in faults]
        write_json(self.marker(item), {"faults": listed, "truncated": truncated})

    def read(self, item: ShardRows) -> tuple[list[tuple[str, Fault]], int]:
        """Return faults and truncated captions, as `write` takes them."""
        content = read_json(self.marker(item))
        return [(key, Fault(reason, detail)) for key, reason, detail in content["faults"]], content["truncated"]

    def rows(self, item: ShardRows) -> npt.NDArray[np.float16]:
        """Return the rows, mapped: float16 [n, d]; raise a DamagedError if the file cannot be read."""
        path = self._path(item)
        try:
            return read_array(path)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path} is damaged ({error}): delete {self._root}, then repeat this command") from error

    def forget(self, items: Sequence[ShardRows]) -> None:
        """Delete the files of a complete part; the marker first."""
        for item in items:
            for path in (self.marker(item), self._path(item)):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete everything: the column is complete."""
        remove_folder(self._root)


@dataclass(frozen=True)
class Embed(Task[Sequence[ShardRows], None]):
    """Embed rows of a shard. Items: these rows, and at most WINDOW - 1 items that the same worker will probably get afterwards."""

    catalog: Path  # its folder
    modality: str  # "image" or "text"
    request: EmbedRequest  # names the encoder, and says how to load it
    batch_size: int  # rows
    dimension: int  # width d of the rows
    finished: Finished  # takes the rows

    def files(self, item: Sequence[ShardRows]) -> Sequence[Path]:
        """Return the file that is written last."""
        return (self.finished.marker(item[0]),)

    def label(self, item: Sequence[ShardRows]) -> str:
        """Return the shard and the rows."""
        return f"shard {item[0].shard}, rows from {item[0].first:,} of part {item[0].part}"

    def run(self, item: Sequence[ShardRows], worker: Worker) -> None:
        """Write the rows of an item."""
        rows = np.zeros((item[0].rows, self.dimension), np.float16)
        faults: list[tuple[str, Fault]] = []
        truncated = 0
        for batch, embedded in worker.cached(
            self, lambda: _Pipeline(self, load_once(self.request, worker), worker.cpus)
        ).take(item):
            found = dict(batch.faults)
            if embedded is not None:
                unit, unfit = normalise_rows(embedded.cpu().numpy())
                rows[batch.piece.start + batch.fit] = unit
                found |= {int(batch.fit[at]): Fault(NO_NUMBERS, text) for at, text in unfit.items()}
            faults += [(batch.piece.keys[at], found[at]) for at in sorted(found)]
            truncated += batch.truncated
        self.finished.write(item[0], rows, faults, truncated)


class _Pipeline:
    """The batches that a device has under way: while it embeds an item, the next items are read and decoded."""

    def __init__(self, task: Embed, encoder: Encoder, cpus: int) -> None:
        self._task, self._encoder = task, encoder
        self._workers = task.request.workers or min(MAX_WORKERS, cpus)
        self._begun = deque[ShardRows]()  # and not taken yet

    def take(self, window: Sequence[ShardRows]) -> Iterator[tuple[Batch, torch.Tensor | None]]:
        """Yield the batches of the first item of a window, each with its embeddings, None without valid rows; begin the others."""
        if not self._begun or tuple(self._begun) != tuple(window[: len(self._begun)]):
            self._restart()
        for item in window[len(self._begun) :]:
            self._begun.append(item)
            self._wanted.append(item)
        left = self._begun.popleft().rows
        try:
            while left:
                batch, embedded = next(self._batches)
                left -= len(batch.piece.keys)
                yield batch, embedded
        except BaseException:
            self._begun.clear()
            raise
        finally:
            if not self._begun:
                self._batches.close()

    def _restart(self) -> None:
        self._begun.clear()
        self._wanted = deque[ShardRows]()
        task, prepare = self._task, self._encoder.sides[self._task.modality].prepare
        items = _taken_from(self._wanted)
        how: dict[str, Any] = {"workers": self._workers, "captions": task.request.captions}
        batches = read_batches(task.catalog, task.modality, prepare, items, task.batch_size, **how)
        self._batches = _embedded(task, self._encoder, batches)


def _taken_from(items: deque[ShardRows]) -> Iterator[ShardRows]:
    while items:
        yield items.popleft()


def _embedded(
    task: Embed, encoder: Encoder, batches: Generator[Batch, None, None]
) -> Generator[tuple[Batch, torch.Tensor | None], None, None]:
    on_gpu = encoder.device.type == "cuda"
    with closing(batches), ThreadPoolExecutor(1) as thread:
        placed: Iterator[Batch] = batches
        if on_gpu:
            moved = _ahead((thread.submit(batch.pin_memory) for batch in batches), 1)
            placed = (future.result() for future in moved)
        # A GPU computes while the CPU takes the rows of the batch before.
        yield from _ahead(((batch, _forward(task, encoder, batch)) for batch in placed), int(on_gpu))


def _forward(task: Embed, encoder: Encoder, batch: Batch) -> torch.Tensor | None:
    if not len(batch.fit):
        return None
    try:
        return encoder.embed(task.modality, batch.tensors)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {task.batch_size} doesn't fit into the memory of {encoder.device}: give a smaller `batch_size`"
        ) from error


def _ahead(items: Iterable[_Item], count: int) -> Iterator[_Item]:
    """Yield items, `count` of them later than they are taken."""
    waiting = deque[_Item]()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
