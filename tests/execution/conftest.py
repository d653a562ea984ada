"""Executors for tests: a shaky one, and actors on the nodes of a small Ray cluster.

With the shaky executor, items run in reverse, every third worker is lost, and no worker keeps anything.
"""

import pickle
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import count

import pytest

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Executor, Worker


@pytest.fixture(autouse=True)
def _spawned_workers(monkeypatch):
    """Worker processes start here as they do for a user."""
    monkeypatch.setattr("tailwise.execution.local.ProcessPoolExecutor", ProcessPoolExecutor)


class Forgetful(Worker):
    """A worker that keeps nothing."""

    def cached(self, key, make):
        hash(key)
        return make()


class ShakyExecutor(Executor):
    """Runs what it was given after a trip through pickle; every third batch runs twice, as after the loss of a worker."""

    def __init__(self):
        self._runs = count()

    def slots(self, needs):
        return 3

    def forget(self):
        pass

    def _run(self, calls, batches, needs):
        results = {}
        for number, batch in reversed(list(enumerate(batches))):
            for _ in range(1 + (next(self._runs) % 3 == 0)):
                sent, items = pickle.loads(pickle.dumps((calls, batch)))
                try:
                    results[number] = pickle.loads(pickle.dumps(sent(items, Forgetful())))
                except UserError as error:
                    raise pickle.loads(pickle.dumps(error)) from None
        yield from (results[number] for number in sorted(results))


class Counting(list):
    """A list that counts how many of its items were taken."""

    taken = 0

    def __iter__(self):
        for item in super().__iter__():
            self.taken += 1
            yield item


@pytest.fixture(scope="session")
def counting():
    """`counting(items)`: a list whose `taken` is the number of items that were taken."""
    return Counting


NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="session")
def ray_nodes():
    """A Ray cluster of two nodes on this machine, with a processor each; of `ray.cluster_utils`."""
    ray = pytest.importorskip("ray", reason="needs ray: pip install ray")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray")  # paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        nodes.add_node(**NODE)
        yield nodes
        ray.shutdown()
        nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def on_ray(ray_nodes):
    """An executor with one actor on each node."""
    from tailwise.execution.ray import RayExecutor

    with RayExecutor(ray_nodes.address, cpus=1) as executor:
        yield executor


@pytest.fixture(params=["shaky", "ray"])
def remote(request):
    """A context with an executor that is not local."""
    return Context(executor=ShakyExecutor() if request.param == "shaky" else request.getfixturevalue("on_ray"))
