"""The Ray executor on real nodes: order, bounds, errors; actors, nodes and drivers that are killed; the same bytes as locally."""

import logging
import math
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.context import Context
from tailwise.errors import UnsupportedError, UserError
from tailwise.execution.base import KERNEL, Apply, Calls, Needs
from tailwise.execution.executors import open_executor
from tailwise.export import EXPORTS, export
from tailwise.plan.plan import Plan
from tailwise.requests import (
    ClusterRequest,
    DedupRequest,
    EmbedRequest,
    ExportRequest,
    FilterRequest,
    GroupRequest,
    PlanRequest,
)
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.verify import verify

logger = logging.getLogger(__name__)  # pytest --log-cli-level INFO shows what was killed
KILL = "__import__('os').kill(__import__('os').getpid(), 9)"


@pytest.fixture
def nodes(ray_nodes, on_ray, wait_until):
    """The cluster, with all its processors free; nodes that a test adds leave in the end."""
    on_ray.close()
    wait_until(lambda: not actors(ray_nodes))
    before = list(ray_nodes.list_all_nodes())
    yield ray_nodes
    for node in ray_nodes.list_all_nodes():
        if node not in before:
            ray_nodes.remove_node(node, allow_graceful=False)


@pytest.fixture
def make_executor(nodes):
    """`make_executor(**options)`: an executor, with actors of one processor."""
    from tailwise.execution.ray import RayExecutor

    made = []

    def make(**options):
        made.append(RayExecutor(nodes.address, **{"cpus": 1, **options}))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def add_node(nodes):
    return nodes.add_node(num_cpus=1, object_store_memory=100 << 20)


def node_id_of(node):
    return node.node_id


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


def actors(nodes):
    """Process ids of actors of the executor."""
    found = []
    for node in nodes.list_all_nodes():
        children = Path(f"/proc/{raylet(node)}/task/{raylet(node)}/children")
        found += children.read_text().split() if children.exists() else []
    return [int(pid) for pid in found if command_of(pid).startswith(b"ray::_Actor")]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # it has ended
        return b""


# --- one map, one reduce ----------------------------------------------------------------------------------------------


def test_results_come_in_order_and_three_items_an_actor_are_under_way(on_ray, counting):
    items, results = counting(range(40)), []
    assert on_ray.slots(KERNEL) == on_ray.slots(Needs()) == 2
    for done, result in enumerate(on_ray.map(Apply(operator.neg), items)):
        results.append(result)
        assert items.taken <= done + 6
    assert results == [-item for item in range(40)]


def test_actors_are_other_processes_and_stay(on_ray):
    pids = [on_ray.reduce(Apply(eval), ["{__import__('os').getpid()}"] * 8, operator.or_) for _ in range(2)]
    assert pids[0] == pids[1]
    assert os.getpid() not in pids[0]
    assert len(pids[0]) == 2


def test_an_error_comes_in_its_place_and_names_its_item(on_ray):
    results = on_ray.map(Apply(math.sqrt), [1.0, 4.0, -1.0, 9.0])
    assert [next(results), next(results)] == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"domain error|nonnegative") as caught:
        next(results)
    assert sys.version_info < (3, 11) or caught.value.__notes__ == ["Apply: -1.0"]
    assert "RemoteTracebackError" in repr(caught.value.__cause__)
    with pytest.raises(ValueError, match=r"domain error|nonnegative"):
        on_ray.reduce(Apply(math.sqrt), [1.0, -1.0], operator.add)


def test_log_records_of_items_come_to_the_driver(on_ray, caplog):
    task = Apply(eval)
    list(on_ray.map(task, ["__import__('logging').getLogger('tailwise.x').warning('of an item')"]))
    assert [record.getMessage() for record in caplog.records if record.name == "tailwise.x"] == ["of an item"]


def test_leaving_early_ends_what_runs(on_ray):
    results = on_ray.map(Apply(time.sleep), [0, *[60] * 9])
    next(results)
    results.close()
    assert list(on_ray.map(Apply(abs), [-1])) == [1]


def test_a_map_within_a_map_uses_the_same_actors(on_ray):
    inner = on_ray.map(Apply(abs), [-number for number in range(20)], KERNEL)
    assert list(on_ray.map(Apply(operator.neg), inner, Needs())) == [-number for number in range(20)]


def test_results_are_merged_in_actors_and_the_driver_gets_one(on_ray, watched):
    import ray

    with watched(ray, "get") as gets:
        assert on_ray.reduce(Apply(abs), [-number for number in range(101)], operator.add, KERNEL) == 5050
    sums = [reference for reference, *_ in gets if not isinstance(reference, list)]
    assert len(sums) <= 2 + 8 + 1  # answers of two new actors, of eight batches, and the sum


def test_work_of_a_killed_actor_is_repeated(on_ray, tmp_path):
    marker = str(tmp_path / "killed")
    items = [str(number) for number in range(9)]
    items[4] = f"4 if __import__('os').path.exists({marker!r}) else (open({marker!r}, 'x'), {KILL})"
    assert list(on_ray.map(Apply(eval), items)) == list(range(9))
    Path(marker).unlink()
    assert on_ray.reduce(Apply(eval), items, operator.add) == 36  # what the actor had merged is merged again


def test_an_item_that_kills_its_actor_three_times_ends_the_run_with_one_line(on_ray):
    from tailwise.execution.local import WorkerLostError

    with pytest.raises(WorkerLostError, match=r"3 workers in a row died while they worked on __import__\('os'\).kill"):
        list(on_ray.map(Apply(eval), ["0", "1", KILL, "3"]))


def test_items_that_kill_their_actors_are_skipped_and_named_in_the_end(make_executor, tmp_path, caplog):
    from tailwise.execution.local import WorkerLostError

    items = [f"open({str(tmp_path / str(number))!r}, 'w').close() or {number}" for number in range(12)]
    items[3] = items[6] = KILL
    results = make_executor(skip_lost=True).map(Apply(eval), items)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(
        WorkerLostError, match=r"all other items are done, but 3 workers.* died while they worked on .*kill.*, .*kill"
    ):
        next(results)
    assert {int(path.name) for path in tmp_path.iterdir()} == {*range(12)} - {3, 6}
    assert sum("is skipped" in record.getMessage() for record in caplog.records) == 2


def test_a_node_that_joins_is_used_and_a_lost_one_is_replaced(nodes, make_executor, monkeypatch):
    monkeypatch.setattr("tailwise.execution.ray.LOOK_SECONDS", 0.2)
    executor, node = make_executor(), None
    tell = Apply(eval)
    item = "(__import__('time').sleep(0.2), __import__('os').getppid())[1]"
    found = []
    for number, parent in enumerate(executor.map(tell, [item] * 90)):
        found.append(parent)
        if number == 5:
            node = add_node(nodes)
        if number == 60:
            assert raylet(node) in found
            os.kill(raylet(node), signal.SIGKILL)
    assert len(found) == 90
    orphan = 1  # a worker may end its item after its raylet is dead
    assert set(found) - {orphan} == {raylet(other) for other in nodes.list_all_nodes()}
    assert found[-1] != raylet(node)


def test_mistakes_are_one_line(nodes):
    with pytest.raises(UserError, match=r"`executor` 'rai'.*did you mean 'ray'"):
        open_executor("rai")
    from tailwise.execution.ray import RayExecutor

    with pytest.raises(UserError, match="`cpus` 0: must be at least 1"):
        RayExecutor(nodes.address, cpus=0)


def test_without_ray_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match=r"`executor` ray needs ray: pip install"):
        open_executor("ray")


# --- a pool through all steps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory, make_tar, make_image, make_embeddings):
    """Tars of 320 samples with 12 directions of embeddings, some of them duplicates."""
    folder = tmp_path_factory.mktemp("pool")
    generator = np.random.default_rng(5)
    axes = np.linalg.qr(generator.normal(size=(16, 16)))[0]
    groups = generator.integers(0, 12, 320)
    vectors = {}
    for shard in range(8):
        members = []
        for row in range(shard * 40, shard * 40 + 40):
            key = f"{row:06d}"
            members += [(f"{key}.jpg", make_image(int(groups[row]))), (f"{key}.txt", f"group {groups[row]}".encode())]
            members.append((f"{key}.json", f'{{"uid": "{row:032x}", "width": {groups[row]}}}'.encode()))
            vectors[key] = axes[groups[row]] + generator.normal(scale=0.05, size=16)
        make_tar(folder / "tars" / f"{shard:05d}.tar", members)
    make_embeddings(folder / "embeddings", vectors, partitions=2)
    return folder


PLANS = {
    "p": PlanRequest("dynamics", keep=0.5, without=["duplicates", "long"], clustering="main"),
    "subset": PlanRequest("dbp", keep=0.4, without=["duplicates"], clustering="main"),
}


def filtered(catalog, context, by, **options):
    filter_samples(catalog, FilterRequest(by, keep=0.9, **options), context)


def exported(catalog, context, name, folder):
    sharding = ExportRequest(shard_samples=40) if name == "shards" else None
    epoch = None if name == "plan-bundle" else 2  # a bundle is of all epochs
    export(Plan(catalog, "p"), name, folder / name, epoch=epoch, request=sharding, context=context)


def verified(catalog, context):
    assert verify(catalog, context)[1] == []


# What each step does to the catalog in `folder`, in order.
STEPS = {
    "import": lambda pool, folder, context: import_pool(
        [pool / "tars", pool / "embeddings"], folder / "catalog", part_rows=80, context=context
    ),
    "embed": lambda pool, folder, context: embed(
        folder / "catalog", EmbedRequest(encoder="pixels", column="seen", of="image", workers=1, device="cpu"), context
    ),
    "filter": lambda pool, folder, context: filtered(folder / "catalog", context, "caption-characters", name="long"),
    "filter by normsim": lambda pool, folder, context: filtered(
        folder / "catalog", context, "normsim", target=pool / "embeddings", name="near"
    ),
    "group": lambda pool, folder, context: group(folder / "catalog", GroupRequest("width"), context),
    "cluster": lambda pool, folder, context: cluster(
        folder / "catalog", ClusterRequest(k=12, density="auto", merge=0.99), context
    ),
    "dedup": lambda pool, folder, context: dedup(folder / "catalog", DedupRequest(epsilon=0.02), context),
    **{
        f"plan {name}": lambda pool, folder, context, name=name: make_plan(
            folder / "catalog", name, PLANS[name], context
        )
        for name in PLANS
    },
    **{
        f"export {name}": lambda pool, folder, context, name=name: exported(
            Catalog.open(folder / "catalog"), context, name, folder
        )
        for name in sorted({*EXPORTS} - {"urls"})  # of pools without images
    },
    "verify": lambda pool, folder, context: verified(Catalog.open(folder / "catalog"), context),
}


def run_steps(pool, folder, context):
    """Take the pool from import to all exports, below `folder`."""
    folder.mkdir()
    for step in STEPS.values():
        step(pool, folder, context)


@pytest.fixture(scope="module")
def local_bytes(pool, tmp_path_factory, tree_bytes):
    folder = tmp_path_factory.mktemp("local") / "made"
    run_steps(pool, folder, Context())
    return tree_bytes(folder)


@pytest.mark.parametrize("workers", [1, 3])
def test_all_steps_give_the_bytes_of_the_local_executor(
    pool, local_bytes, tree_bytes, nodes, make_executor, tmp_path, workers
):
    if workers > 2:
        add_node(nodes)
    executor = make_executor(workers=workers)
    executor._looked = 0.0
    assert executor.slots(KERNEL) == workers
    run_steps(pool, tmp_path / "made", Context(executor=executor))
    assert tree_bytes(tmp_path / "made") == local_bytes


EVERY_STEP = float(os.environ.get("TAILWISE_SOAK", "0.1")) >= 1
KILLED = ("indexing tars", "image embeddings", "assigning", "deciding by the most similar", "drawing")


class Killing:
    """A track that kills an actor, or a raylet, after the first item of some steps; in `make soak`, of all that have several items."""

    def __init__(self, kill, steps):
        self.kill, self.left, self.killed = kill, {*steps}, set()

    def __call__(self, items, description, total=None):
        for number, item in enumerate(items):
            yield item
            chosen = description in self.left or (EVERY_STEP and description not in self.killed)
            if number == 0 and (total or 0) > 1 and chosen:
                self.left.discard(description)
                self.killed.add(description)
                self.kill()


@pytest.mark.slow
def test_all_steps_give_the_same_bytes_if_actors_are_killed(
    pool, local_bytes, tree_bytes, nodes, make_executor, tmp_path
):
    track = Killing(lambda: [os.kill(pid, signal.SIGKILL) for pid in actors(nodes)[:1]], KILLED)
    run_steps(pool, tmp_path / "made", Context(track, make_executor()))
    assert not track.left
    assert tree_bytes(tmp_path / "made") == local_bytes


@pytest.fixture(scope="module")
def before(pool, tmp_path_factory):
    """`before[step]`: the folder as the steps before it leave it, made locally; `before[""]`: after all steps."""
    folder, found = tmp_path_factory.mktemp("before") / "made", {}
    folder.mkdir()
    for name, step in [*STEPS.items(), ("", None)]:
        found[name] = shutil.copytree(folder, folder.with_name(f"before {name}"))
        if step:
            step(pool, folder, Context())
    return found


@pytest.fixture
def expected(before, tree_bytes):
    """`expected(step)`: the bytes after a step."""
    names = [*before]
    return lambda step: tree_bytes(before[names[names.index(step) + 1]])


def kind_of(task):
    """What a task does, in words."""
    function = getattr(task, "function", task)
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def exchanging(nodes, add):
    """An executor that, once for each kind of task, kills the newest node while it has an item, and adds another one."""
    from tailwise.execution.ray import RayExecutor

    class Exchanging(RayExecutor):
        def __init__(self):
            super().__init__(nodes.address, cpus=1)
            self.killed, self.given, self.newest = [], {}, add()

        def _working(self, calls, needs, **options):
            if not self._live:  # wait for the newest node
                with super()._working(Calls(Apply(abs)), Needs(), ahead=1, fixed=False) as work:
                    while {node_id_of(self.newest)} - {slot.place[0] for slot in self._slots if slot.ready}:
                        self._looked = 0.0
                        self._advance(work)
            return super()._working(calls, needs, **options)

        def _submit(self, work, batch, slot):
            super()._submit(work, batch, slot)
            kind = kind_of(work.calls.task)
            self.given.setdefault((kind, id(work)), []).append(batch)
            if kind not in self.killed and slot.place[0] == node_id_of(self.newest):
                self.killed.append(kind)
                os.kill(raylet(self.newest), signal.SIGKILL)
                self.newest = add()

        def repeated(self):
            """Return how many batches ran again."""
            return sum(len(batches) - len(set(batches)) for batches in self.given.values())

    return Exchanging()


@pytest.mark.skipif(not EVERY_STEP, reason="minutes: in `make soak`")
@pytest.mark.parametrize("step", STEPS)
def test_a_step_gives_the_same_bytes_if_nodes_are_killed_and_added(
    step, pool, before, expected, tree_bytes, nodes, tmp_path, monkeypatch
):
    monkeypatch.setattr("tailwise.execution.ray.LOOK_SECONDS", 0.5)
    folder = shutil.copytree(before[step], tmp_path / "made")
    with exchanging(nodes, lambda: add_node(nodes)) as executor:
        STEPS[step](pool, folder, Context(executor=executor))
        logger.info("%s: killed in %s, %d items ran again", step, executor.killed, executor.repeated())
        assert executor.killed
        assert executor.repeated() <= 2 * len(executor.killed)
    assert tree_bytes(folder) == expected(step)


def run_and_die(step, pool, folder, address, noted):
    """Run a step; die after the first item of a part of it that is not noted, and note it."""
    from tailwise.execution.ray import RayExecutor

    def track(items, description, total=None):
        for number, item in enumerate(items):
            if number == 0 and description not in noted.read_text().splitlines():
                with noted.open("a") as stream:
                    stream.write(f"{description}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    with RayExecutor(address, cpus=1) as executor:
        STEPS[step](pool, folder, Context(track, executor))


@pytest.mark.skipif(not EVERY_STEP, reason="minutes: in `make soak`")
@pytest.mark.parametrize("step", STEPS)
def test_a_step_gives_the_same_bytes_if_its_driver_is_killed(step, pool, before, expected, tree_bytes, nodes, tmp_path):
    folder, noted = shutil.copytree(before[step], tmp_path / "made"), tmp_path / "noted"
    noted.touch()
    call = f"run_and_die({step!r}, Path({str(pool)!r}), Path({str(folder)!r}), {nodes.address!r}, Path({str(noted)!r}))"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_ray import *; {call}"
    while True:
        kills = len(noted.read_text().splitlines())
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
        if done.returncode != -signal.SIGKILL:
            break
        assert len(noted.read_text().splitlines()) == kills + 1
    assert done.returncode == 0, done.stderr
    logger.info("%s: killed in %s", step, noted.read_text().splitlines())
    assert kills
    assert tree_bytes(folder) == expected(step)


@pytest.mark.slow
def test_ctrl_c_ends_the_driver_with_advice(pool, nodes, tmp_path, wait_until):
    command = [sys.executable, "-m", "tailwise", "import", pool / "tars", pool / "embeddings", tmp_path / "catalog"]
    environment = {**os.environ, "TAILWISE_EXECUTOR": "ray", "TAILWISE_RAY_ADDRESS": nodes.address}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: actors(nodes), alive=lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "tailwise: interrupted; run the same command again to go on\n")
    wait_until(lambda: not actors(nodes))
