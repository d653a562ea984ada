"""Units of an epoch: copy m of a shard consists of the rows that the epoch draws more than m times."""

from __future__ import annotations

import subprocess
import sys
import weakref
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from tailwise.catalog import layout
from tailwise.catalog.catalog import Catalog
from tailwise.catalog.files import map_cache, note_digest, write_array
from tailwise.errors import UserError
from tailwise.kernels.keyed import count_copies
from tailwise.plan.plan import CHUNK_ROWS, Plan
from tailwise.storage.local import locked

COPY, SIZE = 1, 2  # columns of the table of units, after the shard


def units_of(plan: Plan, epoch: int) -> npt.NDArray[np.int32]:
    """Return the non-empty units of an epoch, shard by shard, by copy number: (shard, copy number, rows), int32 [U, 3].

    They are read from the plan's folder if any process has counted them before. Otherwise all rows are drawn once (about 30 million a
    second), while other processes that ask for the same epoch wait. A read-only catalog gives the same result and keeps nothing.
    """
    epoch = plan.drawn_epoch(epoch)
    path = plan.folder / layout.UNITS / f"{layout.UNITS_OF}{epoch:09d}{layout.ARRAY}"
    if (units := map_cache(path)) is not None:
        return units
    try:
        with locked(layout.lock(path.parent), str(path), wait=True):
            if (units := map_cache(path)) is not None:  # another process has counted them meanwhile
                return units
            units = _count(plan, epoch)
            write_array(path, units, unique=True)
            note_digest(path)
            return units
    except OSError:
        return _count(plan, epoch)


def _count(plan: Plan, epoch: int) -> npt.NDArray[np.int32]:
    with suppress(OSError, UserError):  # without kept slots the draw is the same, but slower
        plan.keep_slots(epoch)
    offsets = plan.shard_offsets
    tables = []
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK_ROWS, side="right")) - 1
        last = max(last, first + 1)
        copies = plan.draw(epoch, slice(int(offsets[first]), int(offsets[last])))
        counts = np.zeros((last - first, 256), np.int64)
        count_copies(copies, np.asarray(offsets[first : last + 1] - offsets[first]), counts)
        shard, copy = np.nonzero(counts)
        tables.append(np.stack([shard + first, copy, counts[shard, copy]], axis=1).astype(np.int32))
        first = last
        plan.release_pages()
    return np.concatenate(tables) if tables else np.empty((0, 3), np.int32)


class Counting:
    """A process that counts an epoch; it ends with the work, or with this object. A thread might hold locks while workers are forked."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        command = (
            "import sys; from tailwise.loader.units import prepare; prepare(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
        )
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
