"""The Ray executor: tasks run in actors on the nodes of a Ray cluster. The only module that imports ray.

Each node has one actor with all its processors for kernels, one for each processor for other work, or one for each GPU for models. Actors
start where nodes join, and others take over where actors or nodes are lost. The driver hands out items, a few ahead, and holds references:
results stay in the object stores of the nodes until they are yielded. In a reduce, each actor merges into the sum on its node, then the
sums are merged in pairs; the driver gets one result.

Ray restarts actors. It does not repeat items: `max_task_retries` also repeats the calls that wait behind a fatal item, so that the wrong
item would be named. `ray.util.ActorPool` holds all results, and loses the item of a dead actor.

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
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tailwise import __version__
from tailwise.errors import UnsupportedError, UserError
from tailwise.execution.base import Calls, Executor, Item, Needs, Result, Task, Worker, split
from tailwise.execution.local import LOSSES, WorkerLostError
from tailwise.log import LEVEL, LOGGER
from tailwise.storage.local import distinguish_temporary_files

AHEAD = 2  # items of a map that an actor has at a time: one runs, one waits
LOOK_SECONDS = 5.0  # between two looks at the nodes of the cluster
POLL_SECONDS = 1.0
START_SECONDS = 30.0  # that batches wait for the actor that keeps values for them
PATIENCE_SECONDS = 60.0  # without a single actor, until a warning
END_SECONDS = 30.0  # that a killed actor may take to end

logger = logging.getLogger(__name__)
_cluster_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
Place = tuple[str, int, int]  # id of a node, processors, GPUs
Record = tuple[str, int, str]  # logger, level, message


class RemoteTracebackError(Exception):
    """Traceback of an error in an actor."""


# --- in the actors ------------------------------------------------------------------------------------------------------------


def _pack(value: object) -> Any:  # noqa: ANN401  (uint8 [n])
    """Return a value as bytes that the object store hands on without a copy. Arrays in it can be written to once it is loaded."""
    return np.frombuffer(pickle.dumps(value, 5), np.uint8)


def _with_trace(error: Exception) -> tuple[Exception, str]:
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (whatever a class of someone else raises)
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, trace


class _Records(logging.Handler):
    """Log records of an item, which the driver shows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Record] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.name, record.levelno, record.getMessage()))


class _Actor:
    """A worker: runs items one after the other, and keeps values from item to item."""

    def __init__(self, device: str | None, cpus: int, level: int, folder: str, version: str) -> None:
        self._device, self._cpus, self._problem = device, cpus, ""
        os.environ |= {"OMP_NUM_THREADS": str(cpus), LEVEL: str(level)}
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(cpus)
        distinguish_temporary_files(uuid.uuid4().hex)  # a lost node may write on for a while
        self._records = _Records()
        LOGGER.setLevel(level)
        LOGGER.handlers[:], LOGGER.propagate = [self._records], False
        self._generation, self._worker = 0, Worker(device, cpus)
        self._get: Callable[[Any], Any] = functools.lru_cache(2)(ray.get)  # a map may take its items from another one
        try:
            os.chdir(folder)
        except OSError as error:
            same = "catalog, shards and working folder must have the same paths on all nodes"
            self._problem = f"no folder {folder} ({error.strerror}): {same}"
        if version != __version__:
            self._problem = f"tailwise {__version__}, {version} in the driver: install the same on all nodes"

    def run(
        self, shared: Sequence[Any], items: Sequence[Any], sums: Sequence[Any], generation: int
    ) -> tuple[tuple[str, list[Record]], Any]:
        """Return (outcome, log), and the packed result of items, merged with sums; outcomes are "done", "failed" and "lost" (a sum)."""
        if self._generation != generation:
            self._generation, self._worker = generation, Worker(self._device, self._cpus)
        outcome, self._records.found = "done", []
        calls = self._get(shared[0])
        try:
            if self._problem:
                node = ray.get_runtime_context().get_node_id()[:8]
                raise UnsupportedError(f"node {node} of the Ray cluster has {self._problem}")
            parts = (pickle.loads(ray.get(each)) for each in sums)
            own = [calls(items, self._worker)] if items else []
            result = functools.reduce(calls.combine, [*own, *parts]) if calls.combine else own[0]
            packed = _pack(result)
        except RayError:
            outcome, packed = "lost", None
        except Exception as error:  # noqa: BLE001  (the driver raises it)
            outcome, packed = "failed", _pack(_with_trace(error))
        return (outcome, self._records.found), packed


# --- in the driver ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    """Items that one actor runs in one call. In a reduce, `packed` then is a sum over all `leaves`."""

    number: int
    items: Sequence[Any]
    sums: list[_Batch] = field(default_factory=list)  # that are merged into this one
    leaves: list[_Batch] = field(default_factory=list)
    slot: _Slot | None = None  # that runs it, or has run it
    packed: Any = None  # reference to the result
    outcome: str = ""  # of `_Actor.run`; "skipped" after too many losses
    losses: int = 0  # actors that died while they ran it; after the first, an actor gets it alone

    def result(self) -> Any:  # noqa: ANN401  (of the task)
        """Return the result, or raise the error of the task; a RayError if the result is lost."""
        value = pickle.loads(ray.get(self.packed))
        if self.outcome == "done":
            return value
        error, trace = value
        raise error from RemoteTracebackError(f"\n{trace}")


@dataclass(eq=False)
class _Work:
    """One `map` or `reduce`."""

    calls: Calls[Any, Any]
    shared: Any  # reference to `calls`; each node fetches it once
    most: int | None  # actors
    ahead: int  # batches that an actor has at a time
    fixed: bool  # batch i runs on actor i mod n, which may have kept values for it
    waiting: list[_Batch] = field(default_factory=list)  # by number
    running: dict[Any, _Batch] = field(default_factory=dict)  # by the reference to (outcome, log), oldest first
    sums: list[_Batch] = field(default_factory=list)  # of a reduce

    def add(self, batches: Iterable[_Batch]) -> None:
        """Let batches wait, again if their actor or result is lost."""
        for batch in batches:
            batch.outcome, batch.packed = "", None
            self.waiting.append(batch)
        self.waiting.sort(key=lambda batch: batch.number)


@dataclass(eq=False)
class _Slot:
    """A place for an actor, on one node."""

    place: Place
    actor: Any = None
    starting: Any = None  # reference to the answer of an actor that starts, until it is there
    since: float = 0.0  # time of the start

    @property
    def ready(self) -> bool:
        return self.actor is not None and self.starting is None

    @property
    def is_soon_ready(self) -> bool:
        return self.ready or time.monotonic() - self.since < START_SECONDS

    def await_start(self) -> None:
        """Wait for the actor, started by the executor or, after its end, by Ray."""
        self.since = time.monotonic()
        self.starting = self.actor.__ray_ready__.options(max_task_retries=-1).remote()

    def end(self, *, restart: bool = False) -> None:
        """Kill the actor. The references of its batches fail."""
        if self.actor is not None:
            with suppress(RayError, ValueError):
                ray.kill(self.actor, no_restart=not restart)
            if restart:
                self.await_start()
            else:
                self.actor = self.starting = None


class RayExecutor(Executor):
    """Run tasks on the nodes of a Ray cluster.

    Results are those of the local executor. An actor or node that is lost costs the items that it had under way; a lost node also costs
    the sums on it. An item whose actor dies LOSSES times ends the run: at once, or with `skip_lost` after all other items of the map.
    """

    def __init__(
        self, address: str = "auto", *, cpus: int | None = None, workers: int | None = None, skip_lost: bool = False
    ) -> None:
        """Connect to a cluster.

        Args:
            address: of the cluster: "auto", HOST:PORT or ray://HOST:PORT; "local" starts one on this machine, until `close`. If this
                process has called `ray.init`, its cluster is used.
            cpus: processors of an actor that runs kernels; None for all of a node. Memory bounds hold for each actor.
            workers: use at most this number of actors.
            skip_lost: skip items that kill their actors. Their map runs all other items, whose files a rerun then finds, and fails with
                the names of those that were skipped: results never depend on it.

        Raises:
            UnsupportedError: there is no such cluster.
            UserError: `cpus` or `workers` is less than 1.
        """
        for name, value in (("cpus", cpus), ("workers", workers)):
            if value is not None and value < 1:
                raise UserError(f"`{name}` {value}: must be at least 1")
        self._cpus, self._most, self._skip_lost = cpus, workers, skip_lost
        self._started = _connect(address)
        self._slots: list[_Slot] = []
        self._needs = Needs()  # that the slots are for
        self._live = 0  # maps and reduces under way
        self._generation = self._failures = 0
        self._nodes, self._looked, self._idle_since = list[Place](), 0.0, time.monotonic()
        self._remote = ray.remote(_Actor)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the cluster if this executor has started it."""
        if ray.is_initialized():
            for slot in self._slots:
                slot.end()
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
        with self._working(calls, needs, ahead=AHEAD, fixed=needs.device is not None) as work:
            left, under_way, skipped = enumerate(batches), deque[_Batch](), list[str]()
            while True:
                room = needs.results * max(1, len(self._slots_of(work))) - len(under_way)
                fresh = [_Batch(number, items) for number, items in itertools.islice(left, max(0, room))]
                under_way += fresh
                work.add(fresh)
                if not under_way:
                    break
                first = under_way[0]
                self._assign(work)
                while not first.outcome:
                    self._advance(work)
                if first.outcome == "skipped":
                    skipped.append(calls.label(first.items))
                elif not skipped:  # else a result would stand in the place of another
                    try:
                        result = first.result()
                    except RayError:  # its node is gone
                        work.add([first])
                        continue
                    yield result
                    del result  # while the next one is waited for
                under_way.popleft()
            if skipped:
                raise WorkerLostError(f"all other items are done, but {_too_many_losses(', '.join(skipped))}")

    def reduce(
        self,
        task: Task[Item, Result],
        items: Sequence[Item],
        combine: Callable[[Result, Result], Result],
        needs: Needs | None = None,
    ) -> Result:
        """Return the merged results of at least one item: each actor merges into the sum on its node, then the sums are merged in pairs."""
        with self._working(Calls(task, combine), needs or Needs(), ahead=1, fixed=True) as work:
            batches = split(items, max(1, len(self._slots_of(work))))
            numbers = itertools.count()
            work.add(_Batch(next(numbers), batch) for batch in batches)
            while True:
                while work.waiting or work.running:
                    self._advance(work)
                if len(work.sums) == 1:
                    (last,) = work.sums
                    try:
                        merged: Result = last.result()
                    except RayError:  # its node is gone
                        work.sums.clear()
                        work.add(last.leaves)
                        continue
                    return merged
                sums, work.sums = work.sums, []
                pairs = [sums[at : at + 2] for at in range(0, len(sums) - 1, 2)]
                work.sums += sums[2 * len(pairs) :]
                work.add(_Batch(next(numbers), (), pair) for pair in pairs)

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
            slot.end()

    def _start(self, slot: _Slot) -> None:
        node, cpus, gpus = slot.place
        device = None if self._needs.device is None else "cuda" if gpus else "cpu"
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = self._remote.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, max_restarts=-1)
        level, folder = LOGGER.getEffectiveLevel(), str(Path.cwd())
        slot.actor = options.remote(device, max(1, cpus), level, folder, __version__)
        slot.await_start()

    def _note_start(self, slot: _Slot) -> None:
        try:
            ray.get(slot.starting)
            slot.starting, self._failures = None, 0
        except RayError as error:
            slot.end()
            self._failures += 1
            if self._failures >= LOSSES * max(1, len(self._slots)) and not any(other.ready for other in self._slots):
                raise WorkerLostError(f"not one worker starts on the Ray cluster: {error}") from error
            self._looked = 0.0  # its node may be lost
            time.sleep(POLL_SECONDS)

    # --- batches ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _working(self, calls: Calls[Any, Any], needs: Needs, *, ahead: int, fixed: bool) -> Iterator[_Work]:
        self._fit(needs)
        work = _Work(calls, ray.put(calls), needs.workers, ahead, fixed)
        self._live += 1
        try:
            yield work
        finally:
            self._live -= 1
            if work.running and ray.is_initialized():  # left early: nothing is written from now on
                for slot in {batch.slot for batch in work.running.values()} & {*self._slots}:
                    if slot is not None:
                        slot.end(restart=True)
                ray.wait([*work.running], num_returns=len(work.running), timeout=END_SECONDS)

    def _slots_of(self, work: _Work) -> list[_Slot]:
        return self._slots[: work.most]

    def _assign(self, work: _Work) -> None:
        """Start actors, and give batches that wait to those that have few."""
        slots = self._slots_of(work)
        for slot in slots:
            if slot.actor is None:
                self._start(slot)
        load = Counter(batch.slot for batch in work.running.values())
        alone = {batch.slot for batch in work.running.values() if batch.losses}
        for depth, (at, slot) in itertools.product(range(work.ahead), enumerate(slots)):
            if not slot.ready or slot in alone or load[slot] > depth:
                continue
            for place, batch in enumerate(work.waiting):
                own = batch.number % len(slots)
                if (own == at or not work.fixed or not slots[own].is_soon_ready) and not (batch.losses and depth):
                    del work.waiting[place]
                    self._submit(work, batch, slot)
                    load[slot] += 1
                    alone |= {slot} if batch.losses else set()
                    break

    def _submit(self, work: _Work, batch: _Batch, slot: _Slot) -> None:
        if not batch.sums:
            batch.sums = [each for each in work.sums if each.slot is slot]
            work.sums = [each for each in work.sums if each.slot is not slot]
        sums = [each.packed for each in batch.sums]
        batch.slot = slot
        status, batch.packed = slot.actor.run.options(num_returns=2).remote(
            [work.shared], batch.items, sums, self._generation
        )
        work.running[status] = batch

    def _advance(self, work: _Work) -> None:
        """Hand out batches, wait a moment for whatever ends, and note it."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._fit()
        self._assign(work)
        starting = {slot.starting: slot for slot in self._slots if slot.starting is not None}
        references, ready = [*starting, *work.running], list[Any]()
        if not references:
            time.sleep(POLL_SECONDS)
        if any(slot.ready for slot in self._slots):
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > PATIENCE_SECONDS:
            logger.warning("waiting for free processors of the Ray cluster: %d workers asked for", len(self._slots))
            self._idle_since = time.monotonic()
        for timeout, wanted in ((POLL_SECONDS, 1), (0, len(references))):
            if references:
                ready, _ = ray.wait(references, num_returns=wanted, timeout=timeout, fetch_local=False)
        for reference in ready:
            if reference in starting:
                self._note_start(starting[reference])
            else:
                self._note_end(work, reference)

    def _note_end(self, work: _Work, reference: Any) -> None:  # noqa: ANN401
        batch = work.running.pop(reference)
        try:
            batch.outcome, records = ray.get(reference)
        except RayTaskError:  # what was sent cannot be read there
            raise
        except RayError:
            self._lose(work, batch)
            return
        batch.losses = 0
        for name, level, message in records:
            logging.getLogger(name).log(level, "%s", message)
        if work.calls.combine is None:  # a map: results and errors come in order
            return
        if batch.outcome == "failed":
            batch.result()
        sums, batch.sums = batch.sums, []
        leaves = [leaf for each in sums for leaf in each.leaves] + ([batch] if batch.items else [])
        for each in sums:
            each.packed, each.leaves = None, []
        if batch.outcome == "lost":
            work.add(leaves)
        else:
            batch.leaves = leaves
            work.sums.append(batch)

    def _lose(self, work: _Work, batch: _Batch) -> None:
        """Let a batch run again whose actor has died. Of the batches that the actor had, the oldest is blamed.

        Raises:
            WorkerLostError: LOSSES actors died while they ran it.
        """
        slot, label = batch.slot, work.calls.label(batch.items) or "sums"
        self._looked = 0.0
        self._fit()
        if slot is not None and slot in self._slots and slot.ready:  # its node is there, and this is its oldest batch
            slot.await_start()
            batch.losses += 1
        if batch.losses < LOSSES:
            logger.warning("a worker of the Ray cluster died: the work on %s is repeated", label)
            work.add([batch])
        elif not self._skip_lost or work.calls.combine is not None:
            raise WorkerLostError(_too_many_losses(label))
        else:
            batch.outcome = "skipped"
            logger.warning("%s is skipped: %d workers in a row died while they worked on it", label, LOSSES)


def _too_many_losses(label: str) -> str:
    return (
        f"{LOSSES} workers in a row died while they worked on {label}, often for lack of memory: give workers fewer processors or nodes "
        "more memory, or look for their end in Ray's logs; then repeat the command"
    )


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
