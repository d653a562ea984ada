"""The loader: a plan's samples in batches, endless, exact and resumable, from the tars as they lie."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from tailwise.errors import UserError
from tailwise.executors.local import end_with_parent
from tailwise.loader.dataset import Batch, BatchDataset, Tokenizer, Transform
from tailwise.loader.locations import Locations, Names, ensure_locations
from tailwise.loader.order import Order, OrderOptions
from tailwise.loader.shards import check_shards
from tailwise.loader.stores import open_store
from tailwise.loader.units import units_of
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.progress import Track, silent

DEFAULT_CACHE = Path(tempfile.gettempdir()) / "tailwise-cache"
DEFAULT_CACHE_BYTES = 32_000_000_000
FEW = 100  # replacements that are always borne, whatever their share
ON_DAMAGED = ("error", "replace")

logger = logging.getLogger(__name__)


class Loader:
    """Batches of a plan, for one of several ranks.

    The order is a function of the plan and the order's options (batch size of all ranks, accumulation, seed, lanes, block, composition,
    first epoch): never of the number of ranks or workers. `position` is the number of the next batch: it counts what was consumed,
    never what was prefetched.

    Attributes:
        plan: which plan.
        order: the endless order.
        position: number of the next batch.
        replaced: samples of this rank that something stood in for, since the loader was made or its state loaded.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
        workers: int = 0,
        seed: int = 0,
        lanes: int = 64,
        block: int = OrderOptions.block,
        compose: str = "shuffle",
        first_epoch: int = 0,
        check: str = "size",
        on_damaged: str = "error",
        max_replaced: float = 0.01,
        cache_folder: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        log: Path | None = None,
        prefetch: int = 2,
        track: Track = silent,
    ) -> None:
        """Checks everything that can be checked, and reads nothing yet.

        Args:
            plan: which plan.
            batch_size: samples of a batch of this rank.
            rank: 0 … world_size − 1.
            world_size: how many ranks share each global batch; divides `lanes`.
            accumulation: batches per optimizer step; no row comes twice in a step, while the pool allows it.
            transform: PIL image → tensor; its random numbers are keyed by (seed, epoch, position). None: encoded images.
            tokenizer: list of captions → tensor [n, …]; None: the captions.
            workers: processes that read; 0 reads in this one.
            seed: of the order and the augmentation; the draw has its own, in the plan.
            lanes: C, see OrderOptions.
            block: samples of a lane that are shuffled together.
            compose: "shuffle", "spread" or "diverse", see OrderOptions.
            first_epoch: the plan's epoch to begin with.
            check: of the tars, before anything is read: "none", "size" or "index" (walks all headers).
            on_damaged: "error", or "replace": samples of missing or changed tars are replaced and counted as unreadable ones are.
            max_replaced: share of this rank's samples that may be replaced, before an error; a hundred always may.
            cache_folder: for remote shards, shared by all processes of this machine.
            cache_bytes: of it, at most.
            log: a JSON-lines file that each replaced sample is appended to.
            prefetch: batches each worker reads ahead.
            track: shows progress of one-time work.

        Raises:
            UserError: an option is out of bounds, or tars are missing or changed.
        """
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank}: must lie between 0 and {world_size - 1}")
        if on_damaged not in ON_DAMAGED:
            raise UserError(f"on_damaged {on_damaged!r}: must be one of {', '.join(ON_DAMAGED)}")
        for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise UserError(f"{name} {value}: must be at least {least}")
        if not 0 <= max_replaced <= 1:
            raise UserError(f"max_replaced {max_replaced}: must lie between 0 and 1")
        options = OrderOptions(batch_size * world_size, accumulation, seed, lanes, block, compose, first_epoch)
        options.check_ranks(world_size)
        self.plan, self.order = plan, Order(plan, options)
        self.position = self.replaced = self._consumed = 0
        self._max_replaced, self._log, self._workers, self._prefetch = max_replaced, log, workers, prefetch
        self._names = Names(plan.catalog, plan.snapshot)
        shards = plan.catalog.shards(plan.snapshot)
        damaged = {
            item.shard: f"{item.path}: {item.reason}"
            for item in check_shards(plan.catalog, plan.snapshot, check, track=track)
        }
        if damaged and on_damaged == "error":
            raise UserError(
                f"{len(damaged):,} of {plan.snapshot.shards:,} tars can't be read as they were imported, the first is "
                f"{next(iter(damaged.values()))}; restore them, tell where they are (`tailwise relocate`), or let other samples stand in "
                "(on_damaged='replace', --damaged replace)"
            )
        for reason in damaged.values():
            logger.warning("samples of this tar are replaced: %s", reason)
        ensure_locations(plan.catalog, plan.snapshot, track)
        store = open_store(
            shards.column("path").to_pylist(),
            cache_folder or DEFAULT_CACHE,
            cache_bytes,
            shards.column("index_checksum").to_pylist(),
        )
        locations = Locations(plan.catalog, plan.snapshot)
        stride = max(1, workers)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._dataset = BatchDataset(
            self.order,
            locations,
            store,
            rank,
            world_size,
            transform,
            tokenizer,
            damaged,
            stride,
            cache_bytes // (2 * ranks_here),
        )
        self._batches: Iterator[Batch | UserError] | None = None
        self._ahead: threading.Thread | None = None
        self._prepared = -1

    def __iter__(self) -> Iterator[Batch]:
        """Batch after batch from `position` on, without end."""
        while True:
            yield self._next()

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch of the plan. What doesn't fill the last one belongs to the next epoch's first.

        Goes on within the epoch if `position` is there already (after `load_state_dict`), else begins with its first batch.

        Raises:
            UserError: an epoch before the order's first.
        """
        if number < self.order.options.first_epoch:
            raise UserError(
                f"epoch {number}: the order begins with epoch {self.order.options.first_epoch} (first_epoch)"
            )
        first, stop = self.batches_until(number), self.batches_until(number + 1)
        if not first <= self.position < stop:
            self.seek(first)
        while self.position < stop:
            yield self._next()

    def _next(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._data_loader())
        batch = next(self._batches)
        if isinstance(batch, UserError):
            self._batches = None  # whoever goes on gets this batch again, not the one after it
            raise batch
        self.position += 1
        self._consumed += len(batch.rows)
        if batch.replaced:
            self._note(batch)
        self._prepare(int(batch.epochs[0]) + 1)
        return batch

    def _data_loader(self) -> DataLoader[Batch | UserError]:
        self._settle()
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=_From(self.position),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else the process's own would lose a number to each start
            pin_memory=torch.cuda.is_available(),
        )

    def _note(self, batch: Batch) -> None:
        """Logs the replaced samples of a batch, and ends when they are too many."""
        self.replaced += len(batch.replaced)
        rows = [row for item in batch.replaced for row in (item.row, item.stand_in)]
        names = self._names.of(np.array(rows))
        lines = []
        for at, item in enumerate(batch.replaced):
            (key, uid), (other_key, other_uid) = names[2 * at : 2 * at + 2]
            line = {"position": item.position, "row": item.row, "key": key, "uid": uid}
            lines.append({**line, "stand_in_key": other_key, "stand_in_uid": other_uid, "reason": item.reason})
            logger.debug("replaced %s", line)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
        if self.replaced > max(FEW, self._max_replaced * self._consumed):
            raise UserError(
                f"{self.replaced:,} of {self._consumed:,} samples had to be replaced, more than the share {self._max_replaced} that "
                f"may be; the last one was uid {lines[-1]['uid']} ({lines[-1]['reason']}); mend the shards or raise max_replaced"
            )

    def _prepare(self, epoch: int) -> None:
        """Counts the units of the next epoch while this one is read, so that no batch waits for it."""
        if epoch <= self._prepared or epoch > MAX_EPOCH or not self.plan.dynamic:
            return
        self._settle()
        self._prepared = epoch
        self._ahead = threading.Thread(target=_count_quietly, args=(self.plan, epoch), daemon=True)
        self._ahead.start()

    def _settle(self) -> None:
        """Waits for the thread that counts: processes must not be forked while it holds locks."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    # --- position ---------------------------------------------------------------------------------------------------

    def seek(self, batch: int) -> None:
        """Makes `batch` the next one. Costs nothing if it is the next one already; else workers begin anew.

        Raises:
            UserError: a negative number.
        """
        if batch < 0:
            raise UserError(f"batch {batch}: must be at least 0")
        if batch != self.position:
            self._batches = None
            self.position = batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs: the position, and what the order depends on."""
        options = {"plan": self.plan.name, **asdict(self.order.options)}
        counts = {"replaced": self.replaced, "consumed": self._consumed}
        return {"position": self.position, "order": self.order.identity, "options": options, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another loader of the same order stopped; the number of ranks and workers may differ.

        Raises:
            UserError: the state is of another order.
        """
        if state["order"] != self.order.identity:
            mine = self.state_dict()["options"]
            changes = [
                f"{name} {value!r} → {mine.get(name)!r}"
                for name, value in state["options"].items()
                if mine.get(name) != value
            ]
            raise UserError(
                f"this state belongs to another order ({', '.join(changes) or 'the plan was made anew'}): use what it was made with"
            )
        self.seek(int(state["position"]))
        self.replaced, self._consumed = int(state["replaced"]), int(state["consumed"])

    def batches_until(self, epoch: int) -> int:
        """How many whole global batches the plan's epochs first_epoch … epoch − 1 fill."""
        return self.order.batches_until(epoch)

    def epoch_at(self, batch: int) -> int:
        """The plan's epoch that a batch begins in."""
        return self.order.epoch_at(batch)

    def close(self) -> None:
        """Ends the workers and lets go of files."""
        self._batches = None
        self._settle()
        self._dataset.store.close()


class _From(Sampler[int]):
    """All whole numbers from `first` on."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            yield number
            number += 1


def _begin_worker(_: int) -> None:
    """A worker ends with its parent, however that ends: one that hangs in a full pipe to it would not notice."""
    end_with_parent()


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401  (as DataLoader has it)
    return batch


def _count_quietly(plan: Plan, epoch: int) -> None:
    """Whoever needs the epoch will count it itself, and say what is wrong."""
    with suppress(OSError, UserError):
        units_of(plan, epoch)
