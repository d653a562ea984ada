from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.verify import verify


def test_every_changed_or_missing_file_is_named(small_catalog):
    cluster(small_catalog, ClusterRequest(k=12))
    make_plan(small_catalog, "p", PlanRequest("dbp", keep=0.5))
    count, bad = verify(small_catalog)
    records = 1 + 2 + 2 + 2 + 2  # the catalog's header, markers of parts, column and joins, manifests
    assert (count, bad) == (2 + 2 + 9 + 6 + records, [])
    spoiled = [
        small_catalog.samples_path(1),
        small_catalog.embedding_folder("image") / "part-000000.npy",
        small_catalog.clusters_folder("main") / "label-part-000001.npy",
    ]
    for path in spoiled:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    missing = small_catalog.plan_folder("p") / "group.npy"
    missing.unlink()
    assert verify(small_catalog) == (count, [*spoiled, missing])
