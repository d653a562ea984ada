"""An executor for tests: items run in reverse, every third worker is lost, and no worker keeps anything."""

import pickle
from itertools import count

import pytest

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.execution.base import Executor, Worker


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


@pytest.fixture
def shaky():
    """A context with such an executor."""
    return Context(executor=ShakyExecutor())
