"""Sections: the samples that each epoch adds to the endless order, in lanes and blocks. Row numbers only; no byte is read.

Within, a unit (copy m of a shard) consists of the rows of the shard that the epoch draws more than m times.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import map_cache, note_digest, write_array
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import KERNEL, Apply, Executor
from tailwise.execution.local import LocalExecutor
from tailwise.kernels.keyed import count_copies, lane_positions, next_prime, permutation, stream_key
from tailwise.kernels.places import by_value
from tailwise.plan.plan import CHUNK_ROWS, MAX_EPOCH, Plan
from tailwise.storage.local import locked
from tailwise.storage.lru import LRUCache

COPY, SIZE = 1, 2  # columns of the table of units, after the shard
KEPT_LAYOUTS = 4  # epochs whose units are kept in memory
KEPT_ROWS = 1 << 22  # row numbers of drawn units that a process keeps: 32 MB
EMPTY_EPOCHS = 1000  # after this number of epochs without a draw, the plan is assumed to draw nothing


class Samples(NamedTuple):
    """Samples of the order: rows of the catalog, int64, and the plan's epoch that drew each, int32, of the same shape."""

    rows: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int32]

    def take(self, index: npt.NDArray[np.int64] | slice | int | tuple[npt.NDArray[np.int64], slice]) -> Samples:
        """Return the samples at some places."""
        return Samples(self.rows[index], self.epochs[index])


@dataclass(frozen=True)
class Section:
    """Samples of one epoch, after those carried from the epoch before, and without those carried to the next."""

    epoch: int  # number of the epoch
    first: int  # first lane position, the same in every lane
    length: int  # samples per lane
    carried: Samples  # first samples, of earlier epochs; fewer than there are lanes
    drawn: int  # number of samples that the epoch draws
    most_copies: int  # largest number of copies of a row

    @property
    def stop(self) -> int:
        """One after its last lane position."""
        return self.first + self.length


class Sections:
    """All sections of a plan, computed one after the other; see `OrderOptions` for the arguments."""

    def __init__(self, plan: Plan, seed: int, lanes: int, block: int, first_epoch: int) -> None:
        self.plan, self.seed, self.lanes, self.block = plan, seed, lanes, block
        self._sections: list[Section] = []
        self._next_epoch = first_epoch
        self._carry = Samples(np.empty(0, np.int64), np.empty(0, np.int32))
        self._layouts: LRUCache[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = LRUCache(KEPT_LAYOUTS)
        self._rows: OrderedDict[tuple[int, int, int], npt.NDArray[np.int64]] = OrderedDict()
        self._kept = 0

    def __getitem__(self, number: int) -> Section:
        while len(self._sections) <= number:
            self._append()
        return self._sections[number]

    def at(self, position: int) -> int:
        """Return the number of the section that holds a lane position."""
        while not self._sections or self._sections[-1].stop <= position:
            self._append()
        number = len(self._sections) - 1  # usually the newest
        while self._sections[number].first > position or not self._sections[number].length:
            number -= 1
        return number

    def _append(self) -> None:
        epoch = self._next_epoch
        if epoch > MAX_EPOCH:
            raise UserError(f"the order of plan {self.plan.name!r} ends with epoch {MAX_EPOCH:,}")
        units, starts = self._layout(epoch)
        drawn = int(starts[-1])
        first = self._sections[-1].stop if self._sections else 0
        length, left = divmod(len(self._carry.rows) + drawn, self.lanes)
        most = int(units[:, COPY].max(initial=-1)) + 1
        section = Section(epoch, first, length, self._carry, drawn, most)
        whole = length * self.lanes
        self._carry = self.samples(section, np.arange(whole, whole + left))
        self._sections.append(section)
        self._next_epoch += 1
        recent = self._sections[-EMPTY_EPOCHS:]
        if len(recent) == EMPTY_EPOCHS and not any(item.drawn for item in recent):
            raise UserError(
                f"plan {self.plan.name!r} drew nothing in {EMPTY_EPOCHS:,} epochs: there is nothing to train on"
            )

    def _layout(self, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the units of an epoch in their order, int32 [U, 3], and their offsets in the drawn samples, int64 [U + 1]."""

        def lay_out() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
            units = units_of(self.plan, epoch)
            ordered = np.empty_like(units)
            ordered[permutation(stream_key(self.seed, "units", epoch), len(units))] = units
            return ordered, np.concatenate([[0], np.cumsum(ordered[:, SIZE], dtype=np.int64)])

        return self._layouts.get(epoch, lay_out)

    def samples(self, section: Section, places: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at some places of a section, in the shape of `places`: carried ones first, then unit after unit."""
        flat = places.ravel()
        rows = np.empty(len(flat), np.int64)
        epochs = np.full(len(flat), section.epoch, np.int32)
        carried = len(section.carried.rows)
        if carried:
            heading = np.flatnonzero(flat < carried)
            rows[heading], epochs[heading] = section.carried.take(flat[heading])
        units, starts = self._layout(section.epoch)
        unit = np.searchsorted(starts, flat - carried, side="right") - 1
        for number, mine in by_value(unit):
            if number >= 0:  # else carried ones
                shard, copy, _ = units[number].tolist()
                rows[mine] = self._unit_rows(section.epoch, shard, copy)[flat[mine] - carried - starts[number]]
        self.plan.release_pages()
        return Samples(rows.reshape(places.shape), epochs.reshape(places.shape))

    def _unit_rows(self, epoch: int, shard: int, copy: int) -> npt.NDArray[np.int64]:
        """Return the rows of a unit, ascending: int64 [n]; recent ones are kept."""
        key = (self.plan.drawn_epoch(epoch), shard, copy)
        rows = self._rows.get(key)
        if rows is None:
            rows = self.plan.rows_of(shard).start + np.flatnonzero(
                self.plan.draw(epoch, self.plan.rows_of(shard)) > copy
            )
            self._rows[key] = rows
            self._kept += len(rows)
            while self._kept > KEPT_ROWS and len(self._rows) > 1:
                self._kept -= len(self._rows.popitem(last=False)[1])
        else:
            self._rows.move_to_end(key)
        return rows

    def lane_samples(self, section: Section, lanes: npt.NDArray[np.int64], first: int, stop: int) -> Samples:
        """Return the samples of some lanes at positions first … stop − 1 of the section: [lanes, stop − first]."""
        places = np.empty((len(lanes), stop - first), np.int64)
        blocks = self.blocks(section)
        small = section.length // blocks
        primes = np.array([next_prime(max(size, 2)) for size in (small, small + 1)], np.int64)
        key = stream_key(self.seed, "block", section.epoch)
        lane_positions(key, lanes, section.length, blocks, primes, first, places)
        return self.samples(section, places)

    def blocks(self, section: Section) -> int:
        """Return the number of blocks of each lane."""
        return max(1, -(-section.length // self.block))


def units_of(plan: Plan, epoch: int, *, keep: bool = True, executor: Executor | None = None) -> npt.NDArray[np.int32]:
    """Return the non-empty units of an epoch, shard by shard, by copy number: (shard, copy number, rows), int32 [U, 3].

    They are read from the plan's folder if any process has counted them before. Otherwise all rows are drawn once (about 30 million a
    second), while other processes that ask for the same epoch wait. Without `keep`, and in a read-only catalog, nothing is written.
    """
    epoch = plan.drawn_epoch(epoch)
    path = plan.folder / layout.UNITS / f"{layout.UNITS_OF}{epoch:09d}{layout.ARRAY}"
    if (units := map_cache(path)) is not None:
        return units
    if not keep:
        return _count(plan, epoch, keep=False)
    try:
        with locked(layout.lock(path.parent), str(path), wait=True):
            if (units := map_cache(path)) is not None:  # another process has counted them meanwhile
                return units
            units = _count(plan, epoch, executor=executor)
            write_array(path, units, unique=True)
            note_digest(path)
            return units
    except OSError:
        return _count(plan, epoch)


def _count(plan: Plan, epoch: int, *, keep: bool = True, executor: Executor | None = None) -> npt.NDArray[np.int32]:
    with suppress(OSError, UserError):  # without kept slots the draw is the same, but slower
        if keep:
            plan.keep_slots(epoch, executor)
    offsets = plan.shard_offsets
    ranges, first = [], 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK_ROWS, side="right")) - 1
        ranges.append((first, max(last, first + 1)))
        first = ranges[-1][1]
    count = Apply(partial(_units_of_shards, plan, epoch))
    return np.concatenate([np.empty((0, 3), np.int32), *(executor or LocalExecutor()).map(count, ranges, KERNEL)])


def _units_of_shards(plan: Plan, epoch: int, shards: tuple[int, int]) -> npt.NDArray[np.int32]:
    first, last = shards
    offsets = plan.shard_offsets[first : last + 1]
    copies = plan.draw(epoch, slice(int(offsets[0]), int(offsets[-1])))
    counts = np.zeros((last - first, 256), np.int64)
    count_copies(copies, np.asarray(offsets - offsets[0]), counts)
    shard, copy = np.nonzero(counts)
    plan.release_pages()
    return np.stack([shard + first, copy, counts[shard, copy]], axis=1).astype(np.int32)


def prepare_epochs(plan: Plan, epochs: range, context: Context | None = None) -> None:
    """Count epochs, and find the slots before the first of them, once for all trainings on all nodes.

    `plan`: whose folder keeps them: 12 bytes for each shard and copy number of an epoch, and the slots before the first epoch and the last
    two, 4 bytes a sample each. `epochs`: consecutive ones.

    Raises:
        UserError: an epoch is out of bounds, or another process is writing.
    """
    if not epochs or epochs[0] < 0 or epochs[-1] > MAX_EPOCH:
        raise UserError(f"epochs {epochs.start} … {epochs.stop - 1}: must lie between 0 and {MAX_EPOCH:,}")
    context = context or Context()
    for epoch in context.progress(epochs, "counting epochs", len(epochs)):  # each from the slots of the one before
        units_of(plan, epoch, executor=context.executor)
    plan.keep_slots(epochs[0], context.executor)


class Counting:
    """A process that counts an epoch; it ends with the work, or with this object. A thread might hold locks while workers are forked."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        command = "import sys; from tailwise.loader.sections import prepare; prepare(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
        arguments = [str(plan.catalog.folder), plan.name, str(epoch)]
        self._process = subprocess.Popen([sys.executable, "-c", command, *arguments], stderr=subprocess.DEVNULL)
        self.stop = weakref.finalize(self, _end, self._process)  # a process that needs the epoch counts it

    @property
    def finished(self) -> bool:
        """True if the process has ended, with or without success."""
        return self._process.poll() is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def prepare(catalog: str, name: str, epoch: int) -> None:
    """Count an epoch, and keep its slots and those of the epoch before, which is being read."""
    plan = Plan(Catalog.open(catalog), name)
    plan.keep_slots(epoch - 1)
    units_of(plan, epoch)
    plan.keep_slots(epoch)
