"""The Ray executor: tasks run in actors on the nodes of a Ray cluster. The only module that imports ray.

Each node has one actor with all its processors for kernels, one for each processor for other work, or one for each GPU for models. Actors
start where nodes join, and others take over where actors or nodes are lost. The driver hands out batches of items, a few ahead, and holds
names, not results: a result stays in the object store of its node until it is yielded. A reduce merges inside each actor, and then in a
tree of actors; the driver gets one result.

All nodes must see the catalog, the shards and the working folder of the driver under the same paths, and have the same tailwise.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tailwise import __version__
from tailwise.errors import UnsupportedError, UserError
from tailwise.execution.base import Calls, Executor, Item, Needs, Result, Task, Worker, split
from tailwise.execution.local import LOSSES, WorkerLostError
from tailwise.log import LEVEL, LOGGER
from tailwise.storage.local import distinguish_temporary_files

AHEAD = 2  # batches that an actor has at a time: one runs, one waits
LOOK_SECONDS = 5.0  # between two looks at the nodes of the cluster
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # without a single actor, until a warning
START_SECONDS = 30.0  # that batches wait for the actor that keeps values for them
END_SECONDS = 30.0  # that a killed actor may take to end

logger = logging.getLogger(__name__)
_cluster_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
Packed = npt.NDArray[np.uint8]
Place = tuple[str, int, int]  # id of a node, processors, GPUs


class RemoteTracebackError(Exception):
    """Traceback of an error in an actor."""


# --- in the actors ------------------------------------------------------------------------------------------------------------


def _pack(value: object) -> Packed:
    """Return a value as bytes that the object store hands on without a copy."""
    return np.frombuffer(pickle.dumps(value, 5), np.uint8)


def _pack_error(error: Exception) -> Packed:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (whatever a class of someone else raises)
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _pack((error, trace))


class _Records(logging.Handler):
    """Log records of an item, which the driver shows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> list[tuple[str, int, str]]:
        found, self.found = self.found, []
        return found


class _Actor:
    """A worker: runs batches one after the other, and keeps values from item to item."""

    def __init__(self, device: str | None, cpus: int, folder: str, level: int) -> None:
        self._device, self._cpus, self._folder = device, cpus, folder
        os.environ |= {"OMP_NUM_THREADS": str(cpus), LEVEL: str(level)}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(cpus)
        distinguish_temporary_files(uuid.uuid4().hex)  # a lost node may write on for a while
        self._records = _Records()
        LOGGER.setLevel(level)
        LOGGER.handlers[:], LOGGER.propagate = [self._records], False
        self._calls: dict[int, Calls[Any, Any]] = {}
        self._sums: dict[int, Any] = {}
        self._generation, self._worker = 0, Worker(device, cpus)

    def begin(self) -> tuple[str, str]:
        """Return the version of tailwise, and why this node cannot be used, or ""."""
        try:
            os.chdir(self._folder)
        except OSError as error:
            return __version__, f"{self._folder} cannot be used there ({error.strerror})"
        return __version__, ""

    def _settle(self, generation: int, live: Sequence[int]) -> None:
        """Drop the values of an earlier generation, and all that belongs to finished work."""
        if self._generation != generation:
            self._generation, self._worker = generation, Worker(self._device, self._cpus)
        for kept in (self._calls, self._sums):
            for number in kept.keys() - set(live):
                del kept[number]

    def run(
        self, number: int, calls: list[Any], batch: Sequence[Any], keep: bool, generation: int, live: Sequence[int]
    ) -> tuple[tuple[bool, list[tuple[str, int, str]]], Packed]:
        """Return (failed, log) and the packed result of a batch; with `keep`, merge it into the sum of the work."""
        self._settle(generation, live)
        failed = False
        try:
            if number not in self._calls:
                self._calls[number] = ray.get(calls[0])  # shared by all actors of a node
            run = self._calls[number]
            result = run(batch, self._worker)
            if keep:
                merged = run.combine(self._sums[number], result) if run.combine and number in self._sums else result
                self._sums[number], result = merged, None
            packed = _pack(result)
        except Exception as error:  # noqa: BLE001  (the driver raises it)
            failed, packed = True, _pack_error(error)
        return (failed, self._records.take()), packed

    def sum_of(self, number: int) -> Any:  # noqa: ANN401  (a result)
        """Return the merged results of the batches that this actor ran."""
        return self._sums[number]

    def merge(self, number: int, first: Any, second: Any) -> Any:  # noqa: ANN401  (results)
        """Return two sums, merged."""
        combine = self._calls[number].combine
        return combine(first, second) if combine else first


# --- in the driver ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    """Items that one actor runs in one call."""

    work: _Work
    number: int
    items: Sequence[Any]
    slot: _Slot | None = None  # that runs it, or has run it
    status: Any = None  # reference to (failed, log)
    packed: Any = None  # reference to the result
    done: bool = False
    failed: bool = False
    losses: int = 0  # actors that died while they had it, in a row; after the first, an actor gets it alone

    def back(self) -> None:
        """Return the batch to those that wait."""
        self.slot = self.status = self.packed = None
        self.done = False
        self.work.waiting.append(self)

    def result(self) -> Any:  # noqa: ANN401  (of the task)
        """Return the result, or raise the error of the task; a RayError if the result is lost."""
        value = pickle.loads(ray.get(self.packed))
        if not self.failed:
            return value
        error, trace = value
        raise error from RemoteTracebackError(f"\n{trace}")


@dataclass(eq=False)
class _Work:
    """One `map` or `reduce`."""

    number: int
    calls: Calls[Any, Any]
    shared: Any  # reference to `calls`; each node fetches it once
    most: int | None  # actors
    keep: bool  # actors merge the results of their batches
    fixed: bool  # batch i runs on actor i mod n, which may have kept values for it
    waiting: deque[_Batch] = field(default_factory=deque)
    batches: list[_Batch] = field(default_factory=list)  # of a reduce


@dataclass(eq=False)
class _Slot:
    """A place for an actor, on one node."""

    place: Place
    actor: Any = None
    starting: Any = None  # reference to the answer of a new actor, until it is there
    since: float = 0.0  # time of the start
    queue: deque[_Batch] = field(default_factory=deque)  # that the actor has, in order

    def takes(self, batch: _Batch) -> bool:
        """Return True if the actor can have another batch. Answers of a dying actor get lost: who shared one with others is not blamed."""
        alone = batch.losses or any(other.losses for other in self.queue)
        return self.ready and len(self.queue) < (1 if alone else AHEAD)

    @property
    def ready(self) -> bool:
        return self.actor is not None and self.starting is None


class RayExecutor(Executor):
    """Run tasks on the nodes of a Ray cluster.

    Results are those of the local executor. An actor or node that is lost costs the items that it had under way and, in a reduce, those
    that it had merged. An item whose actor dies LOSSES times ends the run, because results without it would be others.
    """

    def __init__(self, address: str = "auto", *, cpus: int | None = None, workers: int | None = None) -> None:
        """Connect to a cluster.

        Args:
            address: of the cluster: "auto", HOST:PORT or ray://HOST:PORT; "local" starts one on this machine, until `close`. If this
                process has called `ray.init`, its cluster is used.
            cpus: processors of an actor that runs kernels; None for all of a node. Memory bounds hold for each actor.
            workers: use at most this number of actors.

        Raises:
            UnsupportedError: there is no such cluster.
            UserError: `cpus` or `workers` is less than 1.
        """
        for name, value in (("cpus", cpus), ("workers", workers)):
            if value is not None and value < 1:
                raise UserError(f"`{name}` {value}: must be at least 1")
        self._cpus, self._most = cpus, workers
        self._started = _connect(address)
        self._slots: list[_Slot] = []
        self._needs = Needs()  # that the slots are for
        self._live: dict[int, _Work] = {}
        self._numbers = itertools.count(1)
        self._generation = self._failures = 0
        self._nodes, self._looked, self._idle_since = list[Place](), 0.0, time.monotonic()
        self._remote = ray.remote(_Actor)

    def __enter__(self) -> RayExecutor:
        """Return the executor."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors."""
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if this executor has started it."""
        if ray.is_initialized():
            for slot in self._slots:
                self._end(slot)
            if self._started:
                ray.shutdown()
        self._slots.clear()

    def slots(self, needs: Needs) -> int:
        """Return how many items run at the same time, on the nodes that are there now."""
        self._look()
        return max(1, len(self._places(needs)[: needs.workers]))

    def forget(self) -> None:
        """Let actors drop what they keep, before their next item."""
        self._generation += 1

    def _run(self, calls: Calls[Any, Any], batches: Iterable[Sequence[Any]], needs: Needs) -> Generator[Any]:
        with self._working(calls, needs, keep=False, fixed=needs.device is not None) as work:
            left, under_way = enumerate(batches), deque[_Batch]()
            while True:
                room = needs.results * max(1, len(self._slots_of(work))) - len(under_way)
                for number, items in itertools.islice(left, max(0, room)):
                    batch = _Batch(work, number, items)
                    under_way.append(batch)
                    work.waiting.append(batch)
                if not under_way:
                    return
                first = under_way[0]
                self._assign(work)
                while not first.done:
                    self._advance(work)
                try:
                    result = first.result()
                except RayError:  # its node is gone
                    first.back()
                    continue
                under_way.popleft()
                yield result
                del result  # while the next one is waited for

    def reduce(
        self,
        task: Task[Item, Result],
        items: Sequence[Item],
        combine: Callable[[Result, Result], Result],
        needs: Needs | None = None,
    ) -> Result:
        """Return the merged results of at least one item: actors merge theirs, then each other's, in a tree."""
        needs = needs or Needs()
        with self._working(Calls(task, combine), needs, keep=True, fixed=True) as work:
            batches = split(items, max(1, len(self._slots_of(work))))
            work.batches = [_Batch(work, number, batch) for number, batch in enumerate(batches)]
            work.waiting.extend(work.batches)
            for attempt in itertools.count(1):
                while not all(batch.done for batch in work.batches):
                    self._advance(work)
                try:
                    merged: Result = _merged(work)
                except RayError:
                    if not self._drop_lost() and attempt == LOSSES:
                        raise
                else:
                    return merged
        raise AssertionError  # not reached

    # --- actors ----------------------------------------------------------------------------------------------------------------

    def _places(self, needs: Needs) -> list[Place]:
        """Return where actors run that meet these needs, however many are used."""
        found = list[Place]()
        with_gpus = needs.device not in {None, "cpu"} and any(gpus for _, _, gpus in self._nodes)
        for node, cpus, gpus in self._nodes:
            if needs.device is None and not needs.all_cpus:
                found += [(node, 1, 0)] * cpus
            elif needs.device is not None and with_gpus:
                found += [(node, cpus // gpus, 1)] * gpus if gpus else []
            elif self._cpus is None:
                found += [(node, cpus, gpus)] if cpus else []
            else:
                found += [(node, self._cpus, 0)] * (cpus // self._cpus)
        return found[: self._most]

    def _look(self) -> None:
        """Look which nodes there are, from time to time."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked, alive = now, [node for node in _cluster_nodes() if node["Alive"]]
            amounts = (
                (node["NodeID"], *(int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))) for node in alive
            )
            self._nodes = sorted(amounts)

    def _fit(self, needs: Needs | None = None) -> None:
        """Give each place one slot, and keep the actors of places that stay. Work under way keeps its kind of actors."""
        self._look()
        if needs is not None and not self._live:
            self._needs = needs
        there = dict[Place, deque[_Slot]]()
        for slot in self._slots:
            there.setdefault(slot.place, deque()).append(slot)
        places = self._places(self._needs)
        self._slots = [there[place].popleft() if there.get(place) else _Slot(place) for place in places]
        for slot in itertools.chain(*there.values()):
            self._end(slot)

    def _start(self, slot: _Slot) -> None:
        node, cpus, gpus = slot.place
        device = None if self._needs.device is None else "cuda" if gpus else "cpu"
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = self._remote.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy)
        slot.actor = options.remote(device, max(1, cpus), str(Path.cwd()), LOGGER.getEffectiveLevel())
        slot.starting, slot.since = slot.actor.begin.remote(), time.monotonic()

    def _end(self, slot: _Slot) -> None:
        """Kill the actor of a slot, wait for its end, and return its batches; those that it has merged must be run again."""
        actor, slot.actor, slot.starting = slot.actor, None, None
        queue, slot.queue = slot.queue, deque()
        if actor is not None:
            with suppress(RayError, ValueError):
                ray.kill(actor)
            if queue:  # nothing that it writes may come after what another one writes
                ray.wait([batch.status for batch in queue], num_returns=len(queue), timeout=END_SECONDS)
        merged = [batch for work in self._live.values() for batch in work.batches if batch.slot is slot and batch.done]
        for batch in (*queue, *merged):
            batch.back()

    def _lose(self, slot: _Slot) -> None:
        """Note that the actor of a slot has died.

        Raises:
            WorkerLostError: LOSSES actors died while they ran the same batch.
        """
        self._looked = 0.0
        self._look()
        there, had = any(node == slot.place[0] for node, _, _ in self._nodes), [*slot.queue]
        self._end(slot)
        labels = ", ".join(batch.work.calls.label(batch.items) for batch in had)
        for batch in had:
            batch.losses += there
            if batch.losses == LOSSES:
                raise WorkerLostError(
                    f"{LOSSES} workers in a row died while they worked on {labels}, often for lack of memory: give workers fewer "
                    "processors or nodes more memory, or look for their end in Ray's logs; then repeat the command"
                )
        if had:
            logger.warning("a worker on node %s died: the work on %s is repeated", slot.place[0][:8], labels)

    def _drop_lost(self) -> bool:
        """Find slots whose actors do not answer; return True if there are any."""
        asked = [(slot, slot.actor.begin.remote()) for slot in self._slots if slot.ready]
        lost = [slot for slot, answer in asked if not _is_there(answer)]
        for slot in lost:
            self._lose(slot)
        return bool(lost)

    # --- batches ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _working(self, calls: Calls[Any, Any], needs: Needs, *, keep: bool, fixed: bool) -> Iterator[_Work]:
        self._fit(needs)
        work = _Work(next(self._numbers), calls, ray.put(calls), needs.workers, keep, fixed)
        self._live[work.number] = work
        try:
            yield work
        finally:
            del self._live[work.number]
            if ray.is_initialized():
                for slot in self._slots:
                    if any(batch.work is work for batch in slot.queue):  # left early
                        self._end(slot)

    def _slots_of(self, work: _Work) -> list[_Slot]:
        return self._slots[: work.most]

    def _assign(self, work: _Work) -> None:
        """Hand out batches that wait."""
        slots, now = self._slots_of(work), time.monotonic()
        for slot in slots:
            if slot.actor is None and now - slot.since > POLL_SECONDS:
                self._start(slot)
        left = deque[_Batch]()
        for batch in sorted(work.waiting, key=lambda batch: batch.number):
            own = slots[batch.number % len(slots)] if slots and work.fixed else None
            waits = own is not None and (own.ready or now - own.since < START_SECONDS)
            able = [own] if own is not None and waits else slots
            free = [slot for slot in able if slot.takes(batch)]
            if not free:
                left.append(batch)
                continue
            slot = min(free, key=lambda slot: len(slot.queue))
            live = [*self._live]
            batch.status, batch.packed = slot.actor.run.options(num_returns=2).remote(
                work.number, [work.shared], batch.items, work.keep, self._generation, live
            )
            batch.slot = slot
            slot.queue.append(batch)
        work.waiting = left

    def _advance(self, work: _Work) -> None:
        """Hand out batches, wait a moment for whatever ends, and note it."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._fit()
        self._assign(work)
        waited: dict[Any, _Slot | _Batch] = {slot.starting: slot for slot in self._slots if slot.starting is not None}
        waited |= {batch.status: batch for slot in self._slots for batch in slot.queue}
        if not waited:
            time.sleep(POLL_SECONDS)
        if any(slot.ready for slot in self._slots):
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > PATIENCE_SECONDS:
            logger.warning("waiting for free processors of the Ray cluster: %d workers asked for", len(self._slots))
            self._idle_since = time.monotonic()
        references, ready = list(waited), list[Any]()
        for timeout, wanted in ((POLL_SECONDS, 1), (0, len(references))):
            if references:
                ready, _ = ray.wait(references, num_returns=wanted, timeout=timeout, fetch_local=False)
        for reference in ready:
            there = waited[reference]
            if isinstance(there, _Slot):
                self._note_start(there)
            elif there.status == reference:  # its actor was not lost meanwhile
                self._note_end(there)

    def _note_start(self, slot: _Slot) -> None:
        try:
            version, problem = ray.get(slot.starting)
        except RayError as error:
            self._end(slot)
            self._looked = 0.0
            if isinstance(error, ActorUnschedulableError):  # its node has just been lost
                return
            self._failures += 1
            if self._failures >= LOSSES * max(1, len(self._slots)) and not any(other.ready for other in self._slots):
                raise WorkerLostError(f"not one worker starts on the Ray cluster: {error}") from error
            return
        name = f"node {slot.place[0][:8]} of the Ray cluster"
        if version != __version__:
            raise UnsupportedError(
                f"{name} has tailwise {version}, this process {__version__}: install the same on all nodes"
            )
        if problem:
            raise UserError(
                f"{name}: {problem}: catalog, shards and working folder must have the same paths on all nodes"
            )
        slot.starting, self._failures = None, 0

    def _note_end(self, batch: _Batch) -> None:
        slot = batch.slot
        if slot is None:
            return
        try:
            batch.failed, records = ray.get(batch.status)
        except RayTaskError:  # what was sent cannot be read there
            raise
        except RayError:
            self._lose(slot)
            return
        slot.queue.remove(batch)
        batch.done, batch.losses = True, 0
        for name, level, message in records:
            logging.getLogger(name).log(level, "%s", message)
        if batch.failed and batch.work.keep:
            batch.result()


def _merged(work: _Work) -> Any:  # noqa: ANN401  (a result)
    """Return the sum over all actors that merged batches of a reduce, merged pairwise in these actors."""
    owners = list(dict.fromkeys(batch.slot for batch in work.batches if batch.slot is not None))
    sums = [(slot, slot.actor.sum_of.remote(work.number)) for slot in owners]
    while len(sums) > 1:
        pairs = [sums[at : at + 2] for at in range(0, len(sums), 2)]
        sums = [functools.reduce(functools.partial(_merged_pair, work), pair) for pair in pairs]
    return pickle.loads(pickle.dumps(ray.get(sums[0][1]), 5))  # a copy of its own, as of a local reduce


def _is_there(answer: Any) -> bool:  # noqa: ANN401  (a reference)
    try:
        ray.get(answer, timeout=END_SECONDS)
    except RayError:
        return False
    return True


def _merged_pair(work: _Work, first: tuple[_Slot, Any], second: tuple[_Slot, Any]) -> tuple[_Slot, Any]:
    """Return the reference to two sums, merged in the actor of the first."""
    slot, own = first
    return slot, slot.actor.merge.remote(work.number, own, second[1])


def _connect(address: str) -> bool:
    """Connect to a cluster, unless this process is connected; return True if a cluster was started."""
    if ray.is_initialized():
        return False
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, ImportError) as error:
        raise UnsupportedError(
            f"no Ray cluster is at `ray_address` {address} ({error}): start one with `ray start --head`, give the address of one, or "
            "local for one on this machine"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    return address == "local"
