from tailwise.catalog import clusterings
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing import shards as import_shards
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.status import status


def test_what_is_there_and_what_is_unfinished(small_catalog, interrupted):
    cluster(small_catalog, ClusterRequest(k=12))
    make_plan(small_catalog, "p", PlanRequest("dbp", keep=0.5))
    with interrupted(clusterings, "write_array"):
        cluster(small_catalog, ClusterRequest(k=7, name="half"))
    found = status(small_catalog)
    assert found["snapshots"] == [{"snapshot": 1, "shards": 3, "parts": 2, "samples": 600, "state": "complete"}]
    assert [(item["column"], item["embedded"], item["state"]) for item in found["embeddings"]] == [
        ("image", 600, "complete")
    ]
    assert [(item["name"], item["state"]) for item in found["clusterings"]] == [
        ("half", "unfinished"),
        ("main", "complete"),
    ]
    assert [(item["name"], item["method"], item["budget"]) for item in found["plans"]] == [("p", "dbp", "300")]


def test_an_interrupted_import_is_shown(tmp_path, make_pool, interrupted):
    make_pool(tmp_path / "pool", [5, 5, 5])
    with interrupted(import_shards, "_write_part", lambda _folder, _notes, part: part.number == 2):
        import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=5)
    from tailwise.catalog import Catalog

    found = status(Catalog.open(tmp_path / "catalog"))
    assert [(item["shards"], item["samples"], item["state"]) for item in found["snapshots"]] == [
        (2, 10, "unfinished import: repeat it")
    ]
    assert found["embeddings"] == found["plans"] == found["left out"] == []
