"""What the tests of the loader share: a pool whose images all differ, plans of it, and counts of what an order holds."""

import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from tailwise.catalog import Catalog
from tailwise.loader.order import Order, OrderOptions
from tailwise.plan import Plan
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

# 24 shards of 1 … 90 samples, 1,000 in all.
SHARD_SIZES = (1, 90, 33, 60, 47, 12, 71, 25, 58, 40, 3, 66, 52, 38, 80, 19, 44, 29, 75, 36, 55, 8, 48, 10)
GROUP_SIZES = (400, 200, 120, 80, 60, 40, 30, 25, 20, 15, 7, 3)


@pytest.fixture(scope="session")
def _order_pool_source(tmp_path_factory, make_tar, make_image, make_embeddings, plain_seeding):
    """Tars and a clustered catalog; never changed."""
    folder = tmp_path_factory.mktemp("order_pool")
    generator = np.random.default_rng(7)
    groups = generator.permutation(np.repeat(np.arange(len(GROUP_SIZES)), GROUP_SIZES))
    keys = [f"{row:06d}" for row in range(len(groups))]
    start = 0
    for shard, size in enumerate(SHARD_SIZES):
        members = [
            member
            for row in range(start, start + size)
            for member in ((f"{keys[row]}.jpg", make_image(row)), (f"{keys[row]}.txt", f"caption {row}".encode()))
        ]
        make_tar(folder / "pool" / f"{shard:05d}.tar", members)
        start += size
    axes = np.linalg.qr(generator.normal(size=(16, 16)))[0]
    vectors = axes[groups] + generator.normal(scale=0.05, size=(len(groups), 16))
    embeddings = make_embeddings(folder / "embeddings", dict(zip(keys, vectors, strict=True)))
    sources = [str(folder / "pool"), str(embeddings)]
    catalog = import_pool(sources, folder / "catalog", workers=1, part_rows=300).catalog
    with plain_seeding(len(GROUP_SIZES)):
        cluster(catalog, ClusterRequest(k=len(GROUP_SIZES)))
    return folder


@pytest.fixture(scope="session")
def order_pool(_order_pool_source, tmp_path_factory):
    """A catalog of 1,000 samples in 24 shards, 4 parts and 12 clusters of 400 … 3. No two images are alike; never write to its tars."""
    folder = tmp_path_factory.mktemp("order_catalog") / "catalog"
    shutil.copytree(_order_pool_source / "catalog", folder)
    return Catalog.open(folder)


@pytest.fixture
def own_pool(_order_pool_source, tmp_path):
    """As `order_pool`, with tars of the test's own, in `tmp_path / "pool"`, which it may damage."""
    shutil.copytree(_order_pool_source / "pool", tmp_path / "pool")
    shutil.copytree(_order_pool_source / "catalog", tmp_path / "catalog")
    catalog = Catalog.open(tmp_path / "catalog")
    catalog.relocate(str(_order_pool_source / "pool"), str(tmp_path / "pool"))
    return catalog


@pytest.fixture(scope="session")
def make_rates_plan():
    """`make_rates_plan(catalog, name, rates, **options)` → a plan of one rate per row."""

    def make(catalog, name, rates, **options):
        keys = itertools.chain(*(catalog.samples(part, ["key"]).column(0).to_pylist() for part in catalog.parts()))
        path = catalog.folder.parent / f"{name}.json"
        path.write_text(json.dumps(dict(zip(keys, map(float, rates), strict=True))))
        return make_plan(catalog, name, PlanRequest("rates", rates=path, **options))

    return make


REQUESTS = {
    "stream": PlanRequest("flat", keep=0.5),
    "dbp": PlanRequest("dbp", keep=0.4, pick="random", dynamic=True),
    "static": PlanRequest("dbp", keep=0.4),
    "ranked": PlanRequest("ssp", keep=0.6, pick="hardest"),
    "bernoulli": PlanRequest("dynamics", keep=0.5, draw="bernoulli"),
    "often": PlanRequest("flat", keep=2.0, max_repeats=20),
    "all": PlanRequest("proportional", keep=1.0),
    "few": PlanRequest("random", budget=5),
}


@pytest.fixture(scope="session")
def open_plan(order_pool, make_rates_plan):
    """`open_plan(name)` → a plan of `order_pool`, opened anew; one of REQUESTS, or "rates" (0 … 20 copies a row)."""
    for name, request in REQUESTS.items():
        make_plan(order_pool, name, request)
    rates = np.random.default_rng(3).choice([0, 0.25, 0.5, 1, 1.5, 20], 1000, p=[0.1, 0.4, 0.26, 0.2, 0.03, 0.01])
    make_rates_plan(order_pool, "rates", rates)
    return lambda name: Plan(order_pool, name)


@pytest.fixture(scope="session")
def make_order():
    """`make_order(plan, batch_size, **options)` → a fresh Order."""
    return lambda plan, batch_size, **options: Order(plan, OrderOptions(batch_size, **options))


@pytest.fixture(scope="session")
def drawn():
    """`drawn(plan, epoch)` → {row: copies} of an epoch, from the plan's own draw of all rows."""
    return lambda plan, epoch: Counter(dict(enumerate(plan.draw(epoch).tolist()))) + Counter()
