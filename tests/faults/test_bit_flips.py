"""Damaged files: a command refuses them by name, or makes them again; it gives no other result, and neither crashes nor hangs."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.export import export
from tailwise.plan.explain import explain
from tailwise.plan.plan import Plan
from tailwise.requests import ClusterRequest, DedupRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.why import why

EPOCH = 3


@pytest.fixture
def catalog(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    dedup(small_catalog, DedupRequest(epsilon=0.05))
    make_plan(small_catalog, "p", PlanRequest("dynamics", keep=0.05, without=("duplicates",)))
    return small_catalog


def drawn(catalog, tmp_path):
    path = tmp_path / "drawn.parquet"
    export(Plan(catalog, "p"), "parquet", path, epoch=EPOCH, overwrite=True)
    return pq.read_table(path)


def listed(catalog, tmp_path):
    path = tmp_path / "removed.parquet"
    write_excluded(catalog, path, Plan(catalog, "p"), overwrite=True)
    return pq.read_table(path)


def story(catalog, _):
    return why(catalog, "000001")


def explained(catalog, _):
    return explain(Plan(catalog, "p"), epochs=EPOCH)


def replanned(catalog, tmp_path):
    """Another plan of the same clustering and drop list."""
    folder = tmp_path / "copy"
    for path in [path for path in catalog.folder.rglob("*") if path.is_file() and path.parent.name != "p"]:
        target = folder / path.relative_to(catalog.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.hardlink_to(path)
    copy = Catalog.open(folder)
    try:
        plan = make_plan(copy, "again", PlanRequest("dynamics", keep=0.05, without=("duplicates",)))
        return plan.draw(EPOCH).tolist()
    finally:
        for path in (folder / "plans").rglob("*"):
            if path.is_file():
                path.unlink()


def damages(content, seed):
    """Damaged contents: a bit of the header, of the body, of the end; cut; emptied; longer."""
    random = np.random.default_rng(seed)
    for low, high in ((0, min(128, len(content))), (0, len(content)), (max(0, len(content) - 16), len(content))):
        for at in random.integers(low, high, 2).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(random.integers(8))
            yield bytes(damaged)
    yield content[: int(random.integers(len(content)))]
    yield b""
    yield content + b"\0"


def refuses(path, use, right, catalog, tmp_path):
    """Whether a use refuses a damaged file; it must name it, or give what it gave before."""
    try:
        assert use(catalog, tmp_path) == right
    except UserError as error:
        assert path.name in str(error) or path.parent.name in str(error)
        return True
    return False


def check(path, uses, catalog, tmp_path, seed):
    """Try every damage of a file; returns how many were refused."""
    expected = [use(catalog, tmp_path) for use in uses]
    content, refused = path.read_bytes(), 0
    for damaged in damages(content, seed):
        path.write_bytes(damaged)
        refused += sum(refuses(path, use, right, catalog, tmp_path) for use, right in zip(uses, expected, strict=True))
        path.write_bytes(content)
    return refused


@pytest.mark.parametrize(
    "name", ["group.npy", "group-000001.npy", "rank.npy", "rank-000001.npy", "groups.parquet", "manifest.json"]
)
def test_a_plan(catalog, tmp_path, name):
    refused = check(catalog.plan_folder("p") / name, [drawn, listed, story, explained], catalog, tmp_path, 1)
    assert refused >= 5


@pytest.mark.parametrize("name", ["label-part-000000.npy", "label-part-000001.npy", "clusters.parquet"])
def test_a_clustering(catalog, tmp_path, name):
    assert check(catalog.clusters_folder("main") / name, [replanned, story], catalog, tmp_path, 2) > 0


@pytest.mark.parametrize("name", ["dropped.npy", "dropped-000001.npy", "dropped.parquet"])
def test_a_drop_list(catalog, tmp_path, name):
    assert check(catalog.drops_folder("duplicates") / name, [replanned, listed, story], catalog, tmp_path, 3) > 0


def test_samples(catalog, tmp_path):
    assert check(catalog.samples_path(0), [drawn, listed, story], catalog, tmp_path, 4) > 0


@pytest.mark.parametrize("name", ["similarity.npy", "similarity-000001.npy", "row.npy", "row-000001.npy"])
def test_a_comparison(catalog, tmp_path, name):
    def deduplicated(catalog, _):
        shutil.rmtree(catalog.drops_folder("again"), ignore_errors=True)
        dedup(catalog, DedupRequest(epsilon=0.05, name="again"))
        return pq.read_table(catalog.drops_folder("again") / "dropped.parquet")

    (path,) = catalog.folder.glob(f"neighbours/*/{name}")
    assert check(path, [deduplicated], catalog, tmp_path, 6) >= 5


@pytest.mark.parametrize("part", ["", "-000001"])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_kept_slots_are_made_again(catalog, tmp_path, suffix, part):
    drawn(catalog, tmp_path)
    path = catalog.plan_folder("p") / "slots" / f"before-{EPOCH:09d}{part}{suffix}"
    assert check(path, [drawn], catalog, tmp_path, 5) == 0
