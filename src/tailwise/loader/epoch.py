"""One epoch of a plan as a dataset of samples, for trainers that make batches of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.loader.dataset import BatchDataset, Decode, Tokenizer, Transform
from tailwise.loader.order import LEAST_SPAN_WINDOWS, Order, OrderOptions
from tailwise.loader.pool import DEFAULT_CACHE_BYTES, open_pool
from tailwise.loader.sections import Samples
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.shards.decode import decode_rgb


class EpochDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of one epoch: exactly the samples that the plan draws, each as often as it says.

    Take the samples in their order (`shuffle=False`): it is shuffled, reads few shards at a time, and keeps copies of a sample apart. It
    is a function of plan, seed, batch size, block and epoch. `Loader` has a longer order, in which a batch may hold samples of two epochs.

    A sample is a dict: "image" and "text", as `Loader` has them; "row" of the catalog; "epoch"; with `names`, "key" and "uid".

    Args:
        plan: a plan.
        batch_size: samples of all ranks in a step: so many consecutive ones hold no row twice, if the epoch has eight such steps.
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
        """Return a sample. See `__getitems__`."""
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
