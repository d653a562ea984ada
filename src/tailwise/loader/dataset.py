"""Map-style dataset of batches by number, which workers read, decode and transform; and the account of replaced samples."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from tailwise.catalog.removals import Removals
from tailwise.errors import UserError
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.loader.captions import CaptionMix
from tailwise.loader.order import Block, Order
from tailwise.loader.sections import Samples
from tailwise.loader.substitutes import Substitutes
from tailwise.shards.decode import ImageError
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import ShardStore, read_samples, sample_ranges

logger = logging.getLogger(__name__)
FEW = 100  # replacements that are always allowed, whatever their share
WANTED_BATCHES = 4  # of a worker, fetched ahead by a remote store
WANTED_ROWS = 600_000  # of a block, fetched ahead by a remote store

Decode = Callable[[bytes], Any]
Transform = Callable[[Any], Any]
Tokenizer = Callable[[list[str]], Any]
_Content = tuple[bytes, bytes] | OSError | str  # encoded image and caption, or why they are not read


class Replacement(NamedTuple):
    """Replacement of a sample that was removed or cannot be read."""

    position: int  # in the endless order
    row: int  # row that was drawn
    stand_in: int  # row that was read
    reason: str  # why the drawn row was replaced


class Batch(NamedTuple):
    """One rank's part of a global batch, n samples.

    Attributes:
        images: tensor [n, …], stacked results of the transform; without a transform, a list of n encoded images.
        texts: result of the tokenizer for n captions; without a tokenizer, the list of captions.
        rows: int64 tensor [n], rows of the catalog.
        epochs: int32 tensor [n], the plan's epoch that drew each sample.
        positions: int64 tensor [n], positions in the endless order.
        replaced: replaced samples.
        names: key and uid (32 hexadecimal digits) of each sample, if the loader was made with `names`; else none.
        captions: name of the caption of each sample, if the loader was made with `captions`; else none.
        without_caption: number of samples that lack the caption that was drawn: they have their own.
    """

    images: Any
    texts: Any
    rows: torch.Tensor
    epochs: torch.Tensor
    positions: torch.Tensor
    replaced: list[Replacement]
    names: list[tuple[str, str]]
    captions: list[str]
    without_caption: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the small tensors as arrays: a file descriptor for each would cost more than everything else."""
        numbers = [tensor.numpy() for tensor in (self.rows, self.epochs, self.positions)]
        return _unpickled, (self.images, self.texts, numbers, *self[5:])


def _unpickled(images: Any, texts: Any, numbers: list[npt.NDArray[Any]], *others: Any) -> Batch:  # noqa: ANN401
    rows, epochs, positions = map(torch.from_numpy, numbers)
    return Batch(images, texts, rows, epochs, positions, *others)


@dataclass
class BatchDataset(Dataset["Batch | UserError"]):
    """Batches by number. Can be pickled; files are opened in the process that reads."""

    order: Order  # rows of the batches
    locations: Locations
    store: ShardStore
    damaged: Mapping[int, str]  # shards that are not read, with the reason
    removals: Removals  # samples that are not read
    rank: int
    world_size: int
    decode: Decode  # bytes → image
    transform: Transform | None  # image → tensor; None: images stay encoded
    tokenizer: Tokenizer | None  # captions → tensor [n, …]; None: captions stay text
    replaces: bool  # replace samples that cannot be read from their shard, as broken ones are; else they are an error
    stride: int = 1  # difference of the numbers of two batches of one worker
    names: bool = False  # batches hold keys and uids
    captions: CaptionMix | None = None  # of several captions; None: samples' own
    ahead_bytes: int = 0  # of remote shards that may be fetched ahead
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)  # for threads: guards order and substitutes

    def __post_init__(self) -> None:
        self.substitutes = Substitutes(self.order.plan, self.order.options.seed, self.removals)
        self.forget_wanted()

    def forget_wanted(self) -> None:
        """Ask a remote store again for the next ranges: reading moves to another position, whose ranges may have been evicted."""
        self._wanted = -1
        self._wanted_block: Block | None = None
        self._large_block: Block | None = None  # the latest block that is too large to fetch ahead

    def __getitem__(self, number: int) -> Batch | UserError:
        """Return one batch. A UserError is returned, because one that a worker raises would arrive as a traceback."""
        try:
            return self._batch(number)
        except UserError as error:
            return error

    def _batch(self, number: int) -> Batch:
        with self.lock:
            samples = self.order.batch(number, self.rank, self.world_size)
            self._want_next(number)
        size = self.order.options.batch_size
        first = number * size + self.rank * size // self.world_size
        return self.read(samples, np.arange(first, first + len(samples.rows)))

    def read(self, samples: Samples, positions: npt.NDArray[np.int64]) -> Batch:
        """Return a batch of samples [n] that stand at some positions of the order, int64 [n]."""
        rows = samples.rows.copy()
        images: list[Any] = []
        captions: list[str] = []
        replaced: list[Replacement] = []
        with self._keyed(samples.epochs, positions) as seed:
            chosen = self.captions.of(rows, samples.epochs) if self.captions else None
            others = chosen.texts if chosen else [None] * len(rows)
            for at, (content, caption) in enumerate(zip(self._read(rows), others, strict=True)):
                seed(at)
                found = self._decoded(content, caption)
                if isinstance(found, str):
                    row = int(rows[at])
                    if isinstance(content, OSError) and not self.replaces:  # the shard or the network may be lost
                        remedy = "mend its shard, or let other samples stand in (`on_damaged` replace)"
                        raise UserError(f"row {row:,} can't be read ({content}): {remedy}")
                    with self.lock:
                        rows[at], found_instead = self._substitute(row, int(samples.epochs[at]), partial(seed, at))
                    replaced.append(Replacement(int(positions[at]), row, int(rows[at]), found))
                    found = found_instead
                images.append(found[0])
                captions.append(found[1])
            texts = self._tokenized(captions, seed)
        if replaced and self.captions:
            chosen = self.captions.of(rows, samples.epochs)
        return Batch(
            default_collate(images) if self.transform is not None else images,  # in workers, directly in shared memory
            texts,
            torch.from_numpy(rows),
            torch.from_numpy(samples.epochs.copy()),
            torch.from_numpy(positions),
            replaced,
            self.locations.names(rows) if self.names else [],
            chosen.names if chosen else [],
            chosen.lacking if chosen else 0,
        )

    def _read(self, rows: npt.NDArray[np.int64]) -> list[_Content]:
        shards = self.order.plan.shards_of(rows)
        removed = self.removals.numbers_of(rows)
        readable = (removed == 0) & ~np.isin(shards, list(self.damaged))
        read = read_samples(self.store, shards[readable], self.locations.of(rows[readable]), self.locations.fields)
        contents: list[_Content] = list(read)
        for at in np.flatnonzero(~readable).tolist():
            if removed[at]:
                contents.insert(at, f"removed: {self.removals.removals[removed[at] - 1].reason}")
            else:
                contents.insert(at, OSError(self.damaged[int(shards[at])]))
        return contents

    def _decoded(self, content: _Content, caption: str | None) -> tuple[Any, str] | str:
        """Return image and caption, its own without another one; or the reason why they cannot be used."""
        if not isinstance(content, tuple):
            return str(content)
        encoded, text = content
        try:
            caption = text.decode() if caption is None else caption
        except UnicodeDecodeError as error:
            return f"caption: {error}"
        if self.transform is None:
            return encoded, caption
        try:
            image = self.decode(encoded)
        except ImageError as error:
            return f"image: {error}"
        except Exception as error:  # noqa: BLE001  (broken images make a user's decoder raise anything)
            return f"image: {type(error).__name__}: {error}"
        return self.transform(image), caption

    def _tokenized(self, captions: list[str], seed: Callable[[int], None]) -> Any:  # noqa: ANN401
        """Return tokens of all captions; one by one, with keyed random numbers, if the tokenizer draws some (open_clip's masks)."""
        if self.tokenizer is None:
            return captions
        if getattr(self.tokenizer, "reduction_fn", None) is None:
            return self.tokenizer(captions)
        tokens = []
        for at, caption in enumerate(captions):
            seed(at)
            tokens.append(self.tokenizer([caption]))
        return torch.cat(tokens)

    def _substitute(self, row: int, epoch: int, seed: Callable[[], None]) -> tuple[int, tuple[Any, str]]:
        for other in self.substitutes.of(row, epoch):
            seed()
            caption = (
                self.captions.of(np.array([other]), np.array([epoch], np.int32)).texts[0] if self.captions else None
            )
            found = self._decoded(self._read(np.array([other]))[0], caption)
            if not isinstance(found, str):
                return other, found
        raise UserError(
            f"nothing can be read in place of row {row:,}: most of the pool seems to be gone; see `tailwise status`"
        )

    def _want_next(self, number: int) -> None:
        """Announce the next ranges to a remote store: this and the next block of the lanes; some batches, if blocks are too large.

        The first worker asks for the blocks of all workers, so that a shard's ranges are fetched together.
        """
        if not self.store.remote:
            return
        worker = get_worker_info()
        with suppress(UserError):  # the end of the order, after this batch
            if not self._want_blocks(number, worker is None or worker.id == 0):
                last = number + WANTED_BATCHES * self.stride
                for ahead in range(max(number, self._wanted) + self.stride, last + 1, self.stride):
                    self.store.want(self._ranges(self.order.batch(ahead, self.rank, self.world_size).rows))
                self._wanted = max(last, self._wanted)

    def _want_blocks(self, number: int, asks: bool) -> bool:
        """Return whether whole blocks are fetched ahead: only in base order and up to `ahead_bytes`."""
        here = self.order.block_at(number) if self.order.options.compose == "shuffle" else None
        if here is None or self.order.block_size(here) // self.world_size > WANTED_ROWS:
            return False
        latest = self._wanted_block
        block = here if latest is None or latest < here else self.order.block_after(latest)
        while block <= self.order.block_after(here):
            if block == self._large_block:
                return False
            ranges = self._ranges(self.order.block_rows(block, self.rank, self.world_size))
            if (ranges[:, 2] - ranges[:, 1]).sum() > self.ahead_bytes:
                self._large_block = block
                return False
            if asks:
                self.store.want(ranges)
            self._wanted_block = block
            block = self.order.block_after(block)
        return True

    def _ranges(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rows = rows[self.removals.keeps(rows)]
        return sample_ranges(self.order.plan.shards_of(rows), self.locations.of(rows))[0]

    @contextmanager
    def _keyed(
        self, epochs: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]
    ) -> Iterator[Callable[[int], None]]:
        """Yield a function that seeds all generators of augmentations by (seed, epoch, position); restore their states afterwards."""
        if self.transform is None and self.tokenizer is None:
            yield lambda _: None
            return
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (transforms use it)
        keys = {epoch: stream_key(self.order.options.seed, "augment", epoch) for epoch in set(epochs.tolist())}
        generator = torch.default_generator

        def seed(at: int) -> None:
            number = int(hash_range(keys[int(epochs[at])], int(positions[at]), 1)[0])
            generator.manual_seed(number >> 1)
            random.seed(number)
            np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002

        try:
            yield seed
        finally:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])  # noqa: NPY002


@dataclass
class Counts:
    """Numbers of samples of one rank so far."""

    replaced: int = 0  # replaced samples
    unforeseen: int = 0  # replaced samples that were neither removed nor in a shard that was damaged at the start
    consumed: int = 0  # all samples
    without_caption: int = 0  # samples that lacked the caption that was drawn


class ReplacedSamples:
    """Counts and log of replaced samples, of a dataset; see `tailwise.Loader`."""

    def __init__(self, dataset: BatchDataset, max_replaced: float, log: Path | None) -> None:
        self.dataset, self.counts = dataset, Counts()
        self._max_replaced, self._log = max_replaced, log

    def note(self, batch: Batch) -> None:
        """Count and log the replaced samples of a batch; raise a UserError if they are too many."""
        rows = np.array([item.row for item in batch.replaced], np.int64)
        foreseen = np.isin(
            self.dataset.order.plan.shards_of(rows), list(self.dataset.damaged)
        ) | ~self.dataset.removals.keeps(rows)
        unexpected = [item for item, known in zip(batch.replaced, foreseen.tolist(), strict=True) if not known]
        unforeseen = self.counts.unforeseen + len(unexpected)
        consumed = self.counts.consumed + len(batch.rows)
        if unexpected:
            order = self.dataset.order
            of_epoch = order.batches_until(order.options.first_epoch + 1) * len(batch.rows)
            allowed = self._max_replaced * max(consumed, of_epoch)
            if unforeseen > (max(FEW, allowed) if self._max_replaced else 0):
                last = unexpected[-1]
                ((key, uid),) = self.dataset.locations.names(np.array([last.row]))
                raise UserError(
                    f"{unforeseen:,} of {consumed:,} samples had to be replaced, more than the share {self._max_replaced} that may be; "
                    f"the last one was key {key}, uid {uid} ({last.reason}); mend the shards or raise `max_replaced`"
                )
            if not self.counts.unforeseen:
                logger.warning("a sample was replaced (%s); others are, without a word", unexpected[0].reason)
        if batch.replaced and self._log is not None:
            self._write(self._log, batch)
        without = self.counts.without_caption + batch.without_caption
        self.counts = Counts(self.counts.replaced + len(batch.replaced), unforeseen, consumed, without)

    def _write(self, log: Path, batch: Batch) -> None:
        rows = np.array([row for item in batch.replaced for row in (item.row, item.stand_in)])
        names = self.dataset.locations.names(rows)
        with log.open("a", encoding="utf-8") as stream:
            for at, item in enumerate(batch.replaced):
                (key, uid), (other_key, other_uid) = names[2 * at : 2 * at + 2]
                line = {"position": item.position, "row": item.row, "key": key, "uid": uid}
                line |= {"stand_in_key": other_key, "stand_in_uid": other_uid, "reason": item.reason}
                stream.write(json.dumps(line) + "\n")


def check_appendable(log: Path) -> None:
    """Raise a UserError if a log cannot be written."""
    try:
        log.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"the log {log} can't be written ({error.strerror}): name another file") from error
