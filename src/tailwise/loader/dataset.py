"""The map-style dataset whose index is the number of a batch: what a worker does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from tailwise.catalog.removals import Removals
from tailwise.errors import UserError
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.loader.order import Block, Order
from tailwise.loader.substitutes import Substitutes
from tailwise.shards.decode import ImageError
from tailwise.shards.locations import Locations
from tailwise.shards.ranges import Store, read_samples, sample_ranges

WANTED_BATCHES = 4  # of a worker, that a remote store fetches ahead
WANTED_ROWS = 600_000  # of a block, likewise

Decode = Callable[[bytes], Any]
Transform = Callable[[Any], Any]
Tokenizer = Callable[[list[str]], Any]
_Content = tuple[bytes, bytes] | OSError | str  # encoded image and caption, why they can't be read, or why they aren't


class Replacement(NamedTuple):
    """A sample that was removed or couldn't be read, and what stood in for it.

    Attributes:
        position: in the endless order.
        row: that was drawn.
        stand_in: row that was read.
        reason: why.
    """

    position: int
    row: int
    stand_in: int
    reason: str


class Batch(NamedTuple):
    """One rank's part of a global batch, n samples.

    Attributes:
        images: tensor [n, …], stacked from what the transform gives; without a transform, a list of n encoded images.
        texts: what the tokenizer gives of n captions; without one, the list of captions.
        rows: int64 tensor [n], rows of the catalog.
        epochs: int32 tensor [n], the plan's epoch that drew each sample.
        positions: int64 tensor [n], places in the endless order.
        replaced: which of them are stand-ins for unreadable ones.
    """

    images: Any
    texts: Any
    rows: torch.Tensor
    epochs: torch.Tensor
    positions: torch.Tensor
    replaced: list[Replacement]

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers send the small tensors as arrays: a file descriptor for each would cost more than all the rest."""
        numbers = [tensor.numpy() for tensor in (self.rows, self.epochs, self.positions)]
        return _unpickled, (self.images, self.texts, numbers, self.replaced)


def _unpickled(images: Any, texts: Any, numbers: list[npt.NDArray[Any]], replaced: list[Replacement]) -> Batch:  # noqa: ANN401
    rows, epochs, positions = map(torch.from_numpy, numbers)
    return Batch(images, texts, rows, epochs, positions, replaced)


@dataclass
class BatchDataset(Dataset["Batch | UserError"]):
    """Batches by number. Picklable; opens what it needs in the process that reads.

    Attributes:
        order: which rows.
        locations: where they lie.
        store: reads them.
        rank: of this process's part of the batches.
        world_size: how many parts.
        decode: bytes → image.
        transform: image → tensor; None leaves images encoded.
        tokenizer: captions → tensor [n, …]; None leaves them as they are.
        damaged: shards that aren't read at all, with the reason.
        removals: samples that aren't read at all.
        replaces: whether samples are replaced that can't be read from their shard; else that is an error. Broken ones always are.
        stride: how far apart the batches of one worker are.
        ahead_bytes: of remote shards, that may be fetched ahead.
        lock: held by whoever uses what isn't made for several threads: order and stand-ins.
    """

    order: Order
    locations: Locations
    store: Store
    rank: int
    world_size: int
    decode: Decode
    transform: Transform | None
    tokenizer: Tokenizer | None
    damaged: Mapping[int, str]
    removals: Removals
    replaces: bool
    stride: int
    ahead_bytes: int = 0
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def __post_init__(self) -> None:
        """Prepares what stands in for removed and unreadable samples."""
        self.substitutes = Substitutes(self.order.plan, self.order.sections, self.removals)
        self.forget_wanted()

    def forget_wanted(self) -> None:
        """Asks a remote store anew for what comes next: reading goes on elsewhere, where what was fetched may have gone since."""
        self._wanted = -1
        self._wanted_block: Block | None = None
        self._large_block: Block | None = None  # the latest that was found to be too large to fetch ahead

    def __getitem__(self, number: int) -> Batch | UserError:
        """One batch. A user's mistake is given back, not raised: an exception of a worker would arrive as its whole traceback."""
        try:
            return self._batch(number)
        except UserError as error:
            return error

    def _batch(self, number: int) -> Batch:
        with self.lock:
            samples = self.order.batch(number, self.rank, self.world_size)
            self._want_next(number)
        rows = samples.rows.copy()
        size = self.order.options.batch_size
        first = number * size + self.rank * size // self.world_size
        positions = np.arange(first, first + len(rows))
        images: list[Any] = []
        captions: list[str] = []
        replaced: list[Replacement] = []
        with self._keyed(samples.epochs, positions) as seed:
            for at, content in enumerate(self._read(rows)):
                seed(at)
                found = self._decoded(content)
                if isinstance(found, str):
                    row = int(rows[at])
                    self._check_replaceable(row, content)
                    with self.lock:
                        rows[at], found_instead = self._substitute(row, int(samples.epochs[at]), partial(seed, at))
                    replaced.append(Replacement(int(positions[at]), row, int(rows[at]), found))
                    found = found_instead
                images.append(found[0])
                captions.append(found[1])
            texts = self._tokenized(captions, seed)
        return Batch(
            default_collate(images) if self.transform is not None else images,  # in shared memory at once, in workers
            texts,
            torch.from_numpy(rows),
            torch.from_numpy(samples.epochs.copy()),
            torch.from_numpy(positions),
            replaced,
        )

    def _read(self, rows: npt.NDArray[np.int64]) -> list[_Content]:
        shards = self.order.plan.shards_of(rows)
        removed = self.removals.numbers_of(rows)
        readable = (removed == 0) & ~np.isin(shards, list(self.damaged))
        read = read_samples(self.store, shards[readable], self.locations.of(rows[readable]))
        contents: list[_Content] = list(read)
        for at in np.flatnonzero(~readable).tolist():
            if removed[at]:
                contents.insert(at, f"removed: {self.removals.removals[removed[at] - 1].reason}")
            else:
                contents.insert(at, OSError(self.damaged[int(shards[at])]))
        return contents

    def _decoded(self, content: _Content) -> tuple[Any, str] | str:
        """Image and caption, or the reason why not."""
        if not isinstance(content, tuple):
            return str(content)
        encoded, text = content
        try:
            caption = text.decode()
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

    def _check_replaceable(self, row: int, content: _Content) -> None:
        """Removed and broken samples can be replaced; one that doesn't come from its shard may mean that shard or network have gone."""
        if isinstance(content, OSError) and not self.replaces:
            raise UserError(
                f"row {row:,} can't be read ({content}): mend its shard, or let other samples stand in (`on_damaged` replace)"
            )

    def _tokenized(self, captions: list[str], seed: Callable[[int], None]) -> Any:  # noqa: ANN401
        """All captions at once; one by one, with keyed random numbers, where the tokenizer draws some (open_clip's reduction masks)."""
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
            found = self._decoded(self._read(np.array([other]))[0])
            if not isinstance(found, str):
                return other, found
        raise UserError(
            f"nothing can be read in place of row {row:,}: most of the pool seems to be gone; see `tailwise status`"
        )

    def _want_next(self, number: int) -> None:
        """Tells a remote store what comes next: this block of the lanes and the one after it, or some batches, where that is too much.

        The first worker asks for the blocks, on behalf of all: a shard's ranges are best fetched together.
        """
        if not self.store.remote:
            return
        worker = get_worker_info()
        with suppress(UserError):  # the end of the order, which this batch doesn't reach
            self._want_ahead(number, worker is None or worker.id == 0)

    def _want_ahead(self, number: int, asks: bool) -> None:
        if self._want_blocks(number, asks):
            return
        last = number + WANTED_BATCHES * self.stride
        for ahead in range(max(number, self._wanted) + self.stride, last + 1, self.stride):
            rows = self.order.batch(ahead, self.rank, self.world_size).rows
            self.store.want(self._ranges(rows))
        self._wanted = max(last, self._wanted)

    def _want_blocks(self, number: int, asks: bool) -> bool:
        """Whether whole blocks are fetched ahead: not in compositions that mix or leave out what blocks hold, nor beyond `ahead_bytes`."""
        here = self.order.block_at(number) if self.order.options.compose == "shuffle" else None
        if here is None or self.order.block_size(here) // self.world_size > WANTED_ROWS:
            return False
        block = (
            here
            if self._wanted_block is None or self._wanted_block < here
            else self.order.block_after(self._wanted_block)
        )
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
        """Gives a function that seeds all generators augmentations may use, by (seed, epoch, position); afterwards they are as before."""
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
