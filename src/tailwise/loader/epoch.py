"""One epoch of a plan as a dataset of samples, map-style or iterable, for trainers that make batches of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.captions import CaptionMix
from tailwise.loader.dataset import BatchDataset, Decode, Tokenizer, Transform
from tailwise.loader.order import LEAST_SPAN_WINDOWS, Order, OrderOptions
from tailwise.loader.pool import DEFAULT_CACHE_BYTES, open_pool
from tailwise.loader.ranks import Group, find_ranks
from tailwise.loader.sections import Samples
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.requests import caption_weights
from tailwise.shards.decode import decode_rgb


class EpochDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of one epoch: exactly the samples that the plan draws, each as often as it says.

    Take the samples in their order (`shuffle=False`): it is shuffled, reads few shards at a time, and keeps copies of a sample apart. It
    is a function of plan, seed, batch size, block and epoch. `Loader` has a longer order, in which a batch may hold samples of two epochs.

    A sample is a dict: "image" and "text", as `Loader` has them; "row" of the catalog; "epoch"; with `names`, "key" and "uid"; with
    `captions`, "caption", the name of its caption.

    Args:
        plan: a plan.
        batch_size: samples of all ranks in a step: this number of consecutive ones holds no row twice, if the epoch has eight such steps.
        epoch: the plan's epoch to begin with.
        decode: see `Loader`, as for the arguments that follow; tokenizer is given one caption at a time where samples are.
        transform: see `Loader`.
        tokenizer: see `Loader`.
        seed: see `Loader`.
        block: number of samples that are shuffled together.
        check: see `Loader`.
        on_damaged: see `Loader`. All samples may be replaced.
        cache_folder: see `Loader`.
        cache_bytes: see `Loader`.
        names: samples have their key and uid.
        captions: see `Loader`.
        context: see `Loader`.

    Attributes:
        epoch: the plan's epoch.

    Raises:
        UserError: an option is out of bounds, shards are missing or changed, or the plan draws samples without bytes.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        epoch: int = 0,
        decode: Decode = decode_rgb,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        block: int = 64 * OrderOptions.block,
        check: str = "size",
        on_damaged: str = "error",
        cache_folder: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        names: bool = False,
        captions: Mapping[str, float] | None = None,
        context: Context | None = None,
    ) -> None:
        self.plan = plan
        self._options = OrderOptions(batch_size, seed=seed, lanes=1, block=block)
        self._options.check()
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # workers that run see another one
        self.set_epoch(epoch)
        pool = open_pool(plan, (0, 1), None, check, on_damaged, 1.0, cache_folder, cache_bytes, context or Context())
        self._order = self._order_of(epoch)
        self._samples = BatchDataset(
            *(self._order, *pool, 0, 1, decode, transform, tokenizer),
            replaces=on_damaged == "replace",
            names=names,
            captions=CaptionMix(plan.catalog, weights, seed) if (weights := caption_weights(captions)) else None,
        )

    @property
    def epoch(self) -> int:
        """The plan's epoch."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch of the plan, also in running workers. Call it between two passes."""
        if not 0 <= epoch <= MAX_EPOCH:
            raise UserError(f"epoch {epoch}: must lie between 0 and {MAX_EPOCH:,}")
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Return the number of samples that the epoch draws."""
        return self._current().drawn(self.epoch)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return self.__getitems__([at])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Return samples by their places in the order; a DataLoader asks for a batch at a time.

        Raises:
            IndexError: the epoch has fewer samples.
            UserError: one cannot be read.
        """
        order, size = self._current(), len(self)
        for place in places:
            if not -size <= place < size:
                raise IndexError(f"sample {place} of the {size:,} of epoch {self.epoch}")
        positions = np.array(places, np.int64) % max(size, 1)
        found = [order.batch(position) for position in positions.tolist()]
        batch = self._samples.read(Samples(*map(np.concatenate, zip(*found, strict=True))), positions)
        columns: dict[str, Any] = {"image": batch.images, "text": batch.texts}
        columns |= {"row": batch.rows.tolist(), "epoch": batch.epochs.tolist()}
        if batch.names:
            columns["key"], columns["uid"] = zip(*batch.names, strict=True)
        if batch.captions:
            columns["caption"] = batch.captions
        return [{name: values[at] for name, values in columns.items()} for at in range(len(positions))]

    def _current(self) -> Order:
        if self._order.options.first_epoch != self.epoch:
            self._order = self._samples.order = self._order_of(self.epoch)
        return self._order

    def _order_of(self, epoch: int) -> Order:
        """Return an order of batches of one sample: its first ones are those of the epoch, and each step keeps copies apart."""
        options = replace(self._options, batch_size=1, first_epoch=epoch)
        drawn = Order(self.plan, options).drawn(epoch)
        step = min(self._options.batch_size, max(1, drawn // LEAST_SPAN_WINDOWS))
        return Order(self.plan, replace(options, accumulation=step))


class EpochStream(IterableDataset[dict[str, Any]]):
    """The samples of an `EpochDataset` as an iterable: those of this rank, shared by the workers of a DataLoader.

    A step is `batch_size` consecutive samples of the epoch, of which each rank takes its part, in order. A DataLoader whose batch size is
    `batch_size / world_size` gives the same batches with any number of workers: a worker reads whole steps. The last step may be smaller;
    if it has fewer samples than there are ranks, some ranks have a batch less (`drop_last=True` leaves the step out everywhere).

    Trainers that divide an IterableDataset themselves, as accelerate and HF Trainer do, need rank 0 of 1, or an `EpochDataset`.

    Args:
        plan: a plan.
        batch_size: samples of all ranks in a step; a multiple of the number of ranks.
        rank: see `Loader`.
        world_size: see `Loader`.
        group: see `Loader`.
        options: all other arguments of `EpochDataset`.

    Attributes:
        dataset: the epoch as an `EpochDataset`.

    Raises:
        UserError: as of `EpochDataset`, or the ranks do not divide the batch.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        group: Group = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        self._rank, self._ranks = find_ranks(rank, world_size, group)
        if batch_size % self._ranks:
            raise UserError(f"batch_size {batch_size}: must be a multiple of the {self._ranks} ranks")
        self.dataset = EpochDataset(plan, batch_size=batch_size, **options)
        self._batch_size = batch_size
        self._first_step = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Go to a step of an epoch, also in running workers: to resume there, with any number of ranks. Call it between two passes."""
        self.dataset.set_epoch(epoch)
        steps = -(-len(self.dataset) // self._batch_size)
        if not 0 <= step <= steps:
            raise UserError(f"step {step}: epoch {epoch} has {steps:,} steps")
        self._first_step[0] = step

    def __len__(self) -> int:
        """Return the number of samples of this rank, from the step on."""
        return sum(map(len, self._steps(0, 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of this rank and worker."""
        worker = get_worker_info()
        for step in self._steps(*((0, 1) if worker is None else (worker.id, worker.num_workers))):
            yield from self.dataset.__getitems__(step)

    def _steps(self, worker: int, workers: int) -> Iterator[range]:
        """Yield the places of this rank's samples in each step of a worker."""
        size = len(self.dataset)
        first = (int(self._first_step[0]) + worker) * self._batch_size
        for start in range(first, size, workers * self._batch_size):
            step = min(self._batch_size, size - start)
            yield range(*(start + step * rank // self._ranks for rank in (self._rank, self._rank + 1)))
