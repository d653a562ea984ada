"""The loader: a plan's samples in batches, endless, exact and resumable, from the existing shards."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.local import as_it_is, begin_worker
from tailwise.loader.captions import CaptionMix
from tailwise.loader.dataset import (
    Batch,
    BatchDataset,
    Counts,
    Decode,
    ReplacedSamples,
    Tokenizer,
    Transform,
    check_appendable,
)
from tailwise.loader.order import Order, OrderOptions, choose_lanes
from tailwise.loader.pool import DEFAULT_CACHE_BYTES, open_pool
from tailwise.loader.ranks import Group, find_ranks, ranks_of
from tailwise.loader.sections import Counting
from tailwise.plan.plan import MAX_EPOCH, Plan
from tailwise.requests import caption_weights
from tailwise.shards.decode import decode_rgb

MANY_ROWS = 4_000_000  # of a plan, whose counting takes a while

logger = logging.getLogger(__name__)


class Loader:
    """Batches of a plan, for one of several ranks.

    The order is a function of the plan and the order's options (batch size of all ranks, accumulation, seed, lanes, block, composition,
    first epoch), not of the number of ranks or workers. `position` is the number of the next batch: it counts consumed batches, not
    prefetched ones. An iterator starts there, and goes on by itself: iterators at the same time read the same batches, each with workers
    of its own. `position` is that of the iterator that was used last; `seek` moves all.

    Args:
        plan: a plan.
        batch_size: samples of a batch of this rank.
        rank: 0 … world_size − 1. By default that of the process group or, before there is one, of torchrun's environment.
        world_size: number of ranks that share each global batch; same defaults; divides `lanes`.
        group: torch's process group whose ranks share each global batch; the default group if there is one.
        accumulation: batches per optimizer step; no row comes twice in a step, if the pool is large enough.
        decode: bytes → image; PIL, in RGB, by default.
        transform: image → tensor; its random numbers are keyed by (seed, epoch, position). None: encoded images.
        tokenizer: list of captions → tensor [n, …]; None: the captions.
        workers: processes that read, decode and transform; without transform and tokenizer, one thread that reads ahead, or as many
            threads for remote shards; 0 does everything in this thread.
        seed: seed of the order and the augmentation; the draw has its own, in the plan.
        lanes: C, see OrderOptions; by default 64, or a similar number that fits the batch and the ranks.
        block: samples of a lane that are shuffled together.
        compose: "shuffle", "spread" or "diverse", see OrderOptions.
        first_epoch: the plan's epoch to start with.
        captions: joined captions and their weights, such as {"recap": 0.7, "original": 0.3}. Which one a draw uses depends on (seed,
            epoch, sample) alone. "original" is the sample's own, as for samples that lack the other. None: samples' own.
        check: check of the shards: "none"; "size" (length and first block before reading, the fingerprint when a shard is opened); or
            "index" (the index and the fingerprint before reading).
        on_damaged: shards that are missing or changed, or that fail while they are read, are an "error"; or "replace" their samples, as
            broken samples always are.
        max_replaced: share of the samples that may be replaced: of the pool, for shards that are damaged at the start; otherwise of the
            samples consumed by this rank (or an epoch's, if that is more). 100 are always allowed, unless it is 0.
        cache_folder: folder for ranges of remote shards, shared by all processes of this machine.
        cache_bytes: bound of this cache.
        log: a JSON-lines file to which each replaced sample is appended.
        prefetch: batches that each worker reads ahead.
        pin_memory: pin batches for copying to a GPU; None: if there is one.
        names: batches hold keys and uids too, which are read from the catalog.
        context: runs the tasks and shows progress of one-time work.

    Attributes:
        order: the endless order.
        position: number of the next batch.

    Raises:
        UserError: an option is out of bounds, shards are missing or changed, or the plan draws samples without bytes.
    """

    _spare: _Cursor | None = None  # that of an iterator that has ended: the next one takes it, with its workers
    _passed: int | None = None  # after load_state_dict, the last of the finished epochs that `epoch` has skipped
    _counting: Counting | None = None
    _prepared = -1
    _moves = 0  # number of calls of `seek` that moved
    _warned = False

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        group: Group = None,
        accumulation: int = 1,
        decode: Decode = decode_rgb,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
        workers: int = 0,
        seed: int = 0,
        lanes: int | None = None,
        block: int = OrderOptions.block,
        compose: str = "shuffle",
        first_epoch: int = 0,
        captions: Mapping[str, float] | None = None,
        check: str = "size",
        on_damaged: str = "error",
        max_replaced: float = 0.01,
        cache_folder: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        log: str | Path | None = None,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        names: bool = False,
        context: Context | None = None,
    ) -> None:
        rank, world_size = self._ranks = find_ranks(rank, world_size, group)
        _check_bounds(batch_size=batch_size, workers=workers, prefetch=prefetch)
        global_batch = batch_size * world_size
        chosen = choose_lanes(global_batch, world_size) if lanes is None else lanes
        options = OrderOptions(
            global_batch, accumulation, seed, chosen, block, compose, first_epoch, caption_weights(captions)
        )
        options.check_ranks(world_size)
        self.plan, self.order = plan, Order(plan, options)
        self.position = 0
        self._cursors: WeakSet[_Cursor] = WeakSet()  # of iterators
        self._group, self._lanes, self._workers, self._prefetch = group, lanes, workers, prefetch
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        if log is not None:
            check_appendable(Path(log))
        shared = (check, on_damaged, max_replaced, cache_folder, cache_bytes, context or Context())
        pool = open_pool(plan, self._ranks, group, *shared)
        self._threads = workers if transform is None and tokenizer is None else 0
        # One thread reads local files as fast as batches can be made; more would compete for the interpreter's lock.
        self._read_by = (self._threads, prefetch) if pool.store.remote else (1, prefetch * workers)
        self._dataset = BatchDataset(
            *(self.order, *pool, rank, world_size, decode, transform, tokenizer),
            replaces=on_damaged == "replace",
            stride=1 if self._threads else max(1, workers),
            names=names,
            captions=CaptionMix(plan.catalog, options.captions, seed) if options.captions else None,
            ahead_bytes=cache_bytes // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            lock=threading.Lock() if self._threads else nullcontext(),
        )
        self._replaced = ReplacedSamples(self._dataset, max_replaced, None if log is None else Path(log))

    def __iter__(self) -> Iterator[Batch]:
        """Yield batch after batch from `position` on, without end."""
        return self._read(self._cursor(self.position))

    def _cursor(self, position: int) -> _Cursor:
        """Return a cursor at a position, whose workers may be running."""
        found, self._spare = self._spare, None
        if found is None or found.position != position:
            found = _Cursor(position)
        self._cursors.add(found)
        return found

    def _read(self, cursor: _Cursor, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches from a cursor on; at the end, or when the iterator is dropped, its workers wait for the next one."""
        try:
            while stop is None or cursor.position < stop:
                yield self._next(cursor)
        finally:
            self._spare = cursor

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of one epoch of the plan. Samples that do not fill its last batch belong to the next epoch's first.

        Continues within the epoch if `position` is there, else starts with its first batch. After `load_state_dict`, an epoch that
        ended before the position yields nothing the first time, so that an interrupted loop resumes; the second time it is read again.
        `position` is that at this call, unless `seek` moves it before the first batch.
        """
        return self._read_epoch(number, self.position, self._moves)

    def _read_epoch(self, number: int, position: int, moves: int) -> Iterator[Batch]:
        if moves != self._moves:
            position = self.position
        if number < self.order.options.first_epoch:
            raise UserError(
                f"epoch {number}: the order begins with epoch {self.order.options.first_epoch} (first_epoch)"
            )
        first, stop = self.batches_until(number), self.batches_until(number + 1)
        if self._passed is not None and stop <= position and number > self._passed:
            self._passed = number
            return
        self._passed = None
        if first == stop:
            logger.warning(
                "epoch %d of plan %r fills no batch: it draws %s samples, a global batch takes %s; the next epoch takes them along",
                *(number, self.plan.name, f"{self.order.drawn(number):,}", f"{self.order.taken:,}"),
            )
        if first < stop:
            yield from self._read(self._cursor(position if first <= position < stop else first), stop)

    def _next(self, cursor: _Cursor) -> Batch:
        if cursor.batches is None:
            cursor.batches = self._begin(cursor.position)
        try:
            batch = next(cursor.batches)
            if isinstance(batch, UserError):
                raise batch
            self._replaced.note(batch)
            self._note_repeats(cursor.position, int(batch.epochs[0]))
        except BaseException as error:
            batches, cursor.batches = cursor.batches, None  # a retry gets this batch again, not the next one
            died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")
            # A worker that dies while it sends a batch breaks the connection.
            if died or (hasattr(batches, "_shutdown_workers") and isinstance(error, (ConnectionError, EOFError))):
                # torch ends the process at the next signal of a child, as long as it knows of the dead worker
                with suppress(RuntimeError):
                    getattr(batches, "_shutdown_workers", lambda: None)()
                raise BrokenProcessPool(
                    f"a worker of the loader ended ({error}): out of memory? Give fewer workers. Workers that are spawned also need a "
                    "script whose work stands below `if __name__ == '__main__':`"
                ) from error
            raise
        self.position = cursor.position = cursor.position + 1
        self._prepare(int(batch.epochs[0]) + 1)
        return batch

    def _begin(self, position: int) -> Iterator[Batch | UserError]:
        """Start reading at a position; a UserError if a process group was made after this loader, or the dataset cannot be pickled."""
        found = ranks_of(self._group)
        if found is not None and found != self._ranks:
            raise UserError(
                f"this loader was made for rank {self._ranks[0]} of {self._ranks[1]}, but the process is rank {found[0]} of a group of "
                f"{found[1]}: make the loader after the process group"
            )
        with self._dataset.lock:
            self._dataset.forget_wanted()
        if self._threads:
            return _read_ahead(self._dataset.__getitem__, position, *self._read_by)
        loader: DataLoader[Batch | UserError] = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=count(position),
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            collate_fn=as_it_is,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else each start would draw from the process's own
            pin_memory=self._pin_memory,
        )
        try:
            return iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if not self._workers:
                raise
            raise UserError(
                f"decode, transform or tokenizer can't be sent to worker processes ({error}): define it in a module, or give workers=0"
            ) from error

    @property
    def replaced(self) -> int:
        """Replaced samples of this rank, since the loader was made, or by its state."""
        return self._replaced.counts.replaced

    @property
    def without_caption(self) -> int:
        """Samples of this rank, as for `replaced`, that lacked the caption that was drawn, and had their own."""
        return self._replaced.counts.without_caption

    def _note_repeats(self, position: int, epoch: int) -> None:
        """Warn once if a sample comes twice in a step (all ranks and accumulated batches), because the epoch draws too few."""
        if self._warned:
            return
        with self._dataset.lock:
            repeats = self.order.repeats(position)
        if repeats:
            self._warned = True
            logger.warning(
                "batch %d holds %d samples that %s holds already, and later ones may, too: epoch %d draws %s samples, which is too few "
                "to keep equal ones %s apart (batch × ranks × accumulation); take a smaller batch",
                *(position, repeats, "it" if self.order.options.accumulation == 1 else "its step"),
                *(epoch, f"{self.order.drawn(epoch):,}", f"{self.order.window:,}"),
            )

    def _prepare(self, epoch: int) -> None:
        """Count the units of the next epoch while this one is read, if that takes long, so that no batch waits for it."""
        if self._counting is not None and self._counting.finished:
            self._counting = None
        if epoch <= self._prepared or epoch > MAX_EPOCH or not self.plan.dynamic or self.plan.rows < MANY_ROWS:
            return
        self._prepared = epoch
        if os.environ.get("LOCAL_RANK", "0") == "0" and os.access(self.plan.folder, os.W_OK):
            self._stop_counting()
            self._counting = Counting(self.plan, epoch)

    def _stop_reading(self) -> None:
        self._spare = None
        for cursor in self._cursors:
            cursor.batches = None

    def _stop_counting(self) -> None:
        if self._counting is not None:
            self._counting.stop()
            self._counting = None

    def seek(self, batch: int) -> None:
        """Make `batch` the next one of all iterators; workers restart, unless it is the next one already."""
        if batch < 0:
            raise UserError(f"batch {batch}: must be at least 0")
        self._passed = None
        self._moves += 1
        self.position = batch
        for cursor in self._cursors:
            if cursor.position != batch:
                cursor.position, cursor.batches = batch, None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`: the position, the order's identity and options, and counts."""
        options = {"plan": self.plan.name, **asdict(self.order.options)}
        place = {"position": self.position, "order": self.order.identity, "options": options}
        return {**place, **asdict(self._replaced.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where another loader of the same order stopped, with any number of ranks and workers; a UserError for another order."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise UserError(
                f"this isn't a state of a loader: {', '.join(missing)} is missing; give what state_dict() returned"
            )
        if state["order"] != self.order.identity:
            self._take_lanes(state["options"].get("lanes"))
        if state["order"] != self.order.identity:
            mine = self.state_dict()["options"]
            pairs = ((name, value, mine.get(name)) for name, value in state["options"].items())
            changes = [f"{name} {value!r} → {other!r}" for name, value, other in pairs if other != value]
            raise UserError(
                f"this state belongs to another order ({', '.join(changes) or 'the plan was rebuilt'}): use what it was made with"
            )
        self.seek(int(state["position"]))
        self._passed = self.order.options.first_epoch - 1
        self._replaced.counts = Counts(*(int(state[item.name]) for item in fields(Counts)))

    def _take_lanes(self, lanes: int | None) -> None:
        """Take the lanes that another number of ranks chose, if these ranks can share them and no number was given."""
        options = self.order.options
        if self._lanes is None and lanes and options.batch_size % lanes == 0 and lanes % self._ranks[1] == 0:
            self.order = Order(self.plan, replace(options, lanes=lanes))
            self._dataset = self._replaced.dataset = replace(self._dataset, order=self.order)
            self._stop_reading()

    def batches_until(self, epoch: int) -> int:
        """Return the number of whole global batches that the epochs first_epoch … epoch − 1 fill."""
        return self.order.batches_until(epoch)

    def epoch_at(self, batch: int) -> int:
        """Return the plan's epoch that a batch starts in."""
        return self.order.epoch_at(batch)

    def close(self) -> None:
        """End the workers and close files."""
        self._stop_reading()
        self._stop_counting()
        self._dataset.store.close()


@dataclass(eq=False)
class _Cursor:
    position: int  # number of its next batch
    batches: Iterator[Batch | UserError] | None = None  # from the position on; None before they are read


def _check_bounds(**given: int) -> None:
    for name, value in given.items():
        if value < (least := int(name != "workers")):
            raise UserError(f"{name} {value}: must be at least {least}")


def _read_ahead(
    read: Callable[[int], Batch | UserError], first: int, threads: int, ahead: int
) -> Iterator[Batch | UserError]:
    """Yield read(first), read(first + 1), … without end; `threads` threads read `ahead` batches ahead each.

    They serve where nothing is decoded, so that the bytes need not be sent between processes.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tailwise-read")
    under_way: deque[Future[Batch | UserError]] = deque()
    try:
        for number in count(first):
            under_way.append(pool.submit(read, number))
            if len(under_way) > threads * ahead:
                yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
