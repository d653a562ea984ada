"""Embedding shard by shard, on one device or several; a finished shard is on disk at once: a kill loses at most one per device."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.embeddings import normalise_rows
from tailwise.catalog.files import read_array, read_json, write_array, write_json
from tailwise.encoders import Encoder, load_encoder
from tailwise.encoders.encoder import Fault
from tailwise.errors import DamagedError, UserError
from tailwise.execution.local import begin_process, starting_workers
from tailwise.requests import EncoderRequest
from tailwise.steps.embedding.read import Batch, ShardRows, read_batches

NO_NUMBERS = "no embedding from the encoder"


@dataclass(frozen=True)
class Done:
    """A finished shard.

    Attributes:
        shard: which.
        faults: (row in the shard, key, fault) of samples without embedding.
        truncated: how many captions are longer than the model reads.
    """

    shard: ShardRows
    faults: list[tuple[int, str, Fault]]
    truncated: int


class Finished:
    """Shards of a column that are embedded, and whose part isn't complete: two files each, the second of which comes last."""

    def __init__(self, catalog: Catalog, column: str, made_by: str) -> None:
        """Names the place.

        Args:
            catalog: whose.
            column: its name.
            made_by: hash of all that decides the rows; unfinished rows of another encoder stay elsewhere until the column is complete.
        """
        self._root = catalog.embedding_folder(column) / layout.UNFINISHED
        self._folder = self._root / made_by

    def _path(self, shard: ShardRows) -> Path:
        return self._folder / f"{layout.SHARD}{shard.shard:08d}{layout.ARRAY}"

    def write(self, done: Done, rows: npt.NDArray[np.float16]) -> None:
        """Keeps a shard's rows, float16 [rows, d]."""
        write_array(self._path(done.shard), rows)
        faults = [[row, key, fault.reason, fault.detail] for row, key, fault in done.faults]
        write_json(layout.marker(self._path(done.shard)), {"faults": faults, "truncated": done.truncated})

    def find(self, shard: ShardRows) -> Done | None:
        """Return the result of a shard; None if it is not finished."""
        path = layout.marker(self._path(shard))
        if not path.exists():
            return None
        content = read_json(path)
        faults = [(row, key, Fault(reason, detail)) for row, key, reason, detail in content["faults"]]
        return Done(shard, faults, content["truncated"])

    def get(self, shard: ShardRows) -> Done:
        """Return the result of a finished shard.

        Raises:
            UserError: it is gone.
        """
        done = self.find(shard)
        if done is None:
            raise UserError(f"{layout.marker(self._path(shard))} is gone: repeat this command")
        return done

    def rows(self, shard: ShardRows) -> npt.NDArray[np.float16]:
        """The rows of a finished shard, mapped.

        Raises:
            UserError: they are damaged.
        """
        path = self._path(shard)
        try:
            return read_array(path)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path} is damaged ({error}): delete {self._root}, then repeat this command") from error

    def forget(self, shards: Sequence[ShardRows]) -> None:
        """Drops what is part of a complete part now; the marker first."""
        for shard in shards:
            for path in (layout.marker(self._path(shard)), self._path(shard)):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Drops everything: the column is complete."""
        shutil.rmtree(self._root, ignore_errors=True)


@dataclass(frozen=True)
class Work:
    """Work of one or several devices.

    Attributes:
        folder: of the catalog.
        column: its name.
        modality: "image" or "text".
        shards: to embed, in order.
        batch_size: rows.
        workers: processes that read for each device, as `read_batches` has it.
        dimension: d.
        made_by: as `Finished` has it.
    """

    folder: Path
    column: str
    modality: str
    shards: list[ShardRows]
    batch_size: int
    workers: int | None
    dimension: int
    made_by: str


@dataclass(frozen=True)
class Step:
    """A batch that is done.

    Attributes:
        rows: of it.
        finished: the shard that it completes on disk, if it is the last piece of one.
    """

    rows: int
    finished: ShardRows | None


@dataclass
class _Open:
    """A shard that is being embedded."""

    rows: npt.NDArray[np.float16]
    faults: list[tuple[int, str, Fault]] = field(default_factory=list)
    truncated: int = 0


def embed_shards(work: Work, encoder: Encoder) -> Iterator[Step]:
    """Embeds shards on one device.

    Raises:
        UserError: a shard can't be read, or the batch is too large for the device.
    """
    finished = Finished(Catalog.open(work.folder), work.column, work.made_by)
    on_gpu = encoder.device.type == "cuda"
    batches = read_batches(
        work.folder,
        work.modality,
        encoder.sides[work.modality].prepare,
        work.shards,
        work.batch_size,
        workers=work.workers,
        pin=on_gpu,
    )
    # A GPU computes while the CPU takes the rows of the batch before.
    waiting: deque[tuple[Batch, torch.Tensor | None]] = deque()
    opened: dict[int, _Open] = {}
    for batch in batches:
        waiting.append((batch, _forward(encoder, work, batch)))
        if len(waiting) > int(on_gpu):
            yield _take(*waiting.popleft(), opened, finished, work.dimension)
    while waiting:
        yield _take(*waiting.popleft(), opened, finished, work.dimension)


def _forward(encoder: Encoder, work: Work, batch: Batch) -> torch.Tensor | None:
    if not len(batch.fit):
        return None
    try:
        return encoder.embed(work.modality, batch.tensors)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {work.batch_size} doesn't fit into the memory of {encoder.device}: give a smaller `batch_size`"
        ) from error


def _take(
    batch: Batch, embedded: torch.Tensor | None, opened: dict[int, _Open], finished: Finished, dimension: int
) -> Step:
    """Puts a batch's rows in their places; the last batch of a shard finishes it."""
    shard, start = batch.piece.of, batch.piece.start
    if shard.shard not in opened:
        opened[shard.shard] = _Open(np.zeros((shard.rows, dimension), np.float16))
    current = opened[shard.shard]
    faults_here = dict(batch.faults)
    if embedded is not None:
        rows, unfit = normalise_rows(embedded.cpu().numpy())
        current.rows[start + batch.fit] = rows
        faults_here |= {int(batch.fit[at]): Fault(NO_NUMBERS, text) for at, text in unfit.items()}
    current.faults += [(start + at, batch.keys[at], fault) for at, fault in faults_here.items()]
    current.truncated += batch.truncated
    if not batch.piece.last:
        return Step(batch.piece.rows, None)
    faults = sorted(current.faults, key=lambda fault: fault[0])
    finished.write(Done(shard, faults, current.truncated), opened.pop(shard.shard).rows)
    return Step(batch.piece.rows, shard)


def embed_on_devices(work: Work, name: str, options: EncoderRequest, devices: Sequence[torch.device]) -> Iterator[Step]:
    """Embeds shards on several devices, one process and one copy of the encoder each, that take them in turn.

    Raises:
        UserError: as `embed_shards` has it.
        BrokenProcessPool: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receivers: list[Any] = []
    processes = []
    try:
        for at, device in enumerate(devices):
            mine = replace(work, shards=work.shards[at :: len(devices)])
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_on_device, args=(mine, name, options, str(device), sender))
            with starting_workers():
                process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        while receivers:
            for ready in connection.wait(receivers):
                yield from _received(ready, receivers)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _received(receiver: Any, receivers: list[Any]) -> Iterator[Step]:  # noqa: ANN401  (a Connection)
    try:
        said = receiver.recv()
    except EOFError as error:
        raise BrokenProcessPool("the process of a device ended") from error
    if isinstance(said, UserError):
        raise said
    if said is None:
        receivers.remove(receiver)
    else:
        yield said


def _on_device(work: Work, name: str, options: EncoderRequest, device: str, sender: Any) -> None:  # noqa: ANN401
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin_process()
    try:
        encoder = load_encoder(name, options, torch.device(device))
        for step in embed_shards(work, encoder):
            sender.send(step)
        sender.send(None)
    except UserError as error:
        sender.send(error)
