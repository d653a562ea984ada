"""A catalog of more parts than a process may open files."""

import numpy as np

PARTS, FILES = 150, 100
SCRIPT = """
import resource, sys
from pathlib import Path
import tailwise
from tailwise import ClusterRequest, DedupRequest, FilterRequest, GroupRequest, Loader, PlanRequest
from tailwise.steps.upkeep.excluded import write_excluded
from tailwise.steps.upkeep.verify import verify
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[4]), int(sys.argv[4])))
tars, embeddings, folder = sys.argv[1:4]
catalog = tailwise.import_pool([tars, embeddings], Path(folder) / "catalog", workers=1, part_rows=1).catalog
assert len(catalog.parts()) == int(sys.argv[5])
tailwise.cluster(catalog, ClusterRequest(k=12, density="auto"))
tailwise.dedup(catalog, DedupRequest(epsilon=0.02))
tailwise.filter_samples(catalog, FilterRequest("caption-characters", keep=0.9))
tailwise.group(catalog, GroupRequest("shard", without=["duplicates"]))
plan = tailwise.make_plan(catalog, "p", PlanRequest("dynamics", keep=0.4))
tailwise.export_plan(plan, "parquet", Path(folder) / "epoch.parquet", epoch=1)
tailwise.export_plan(plan, "shards", Path(folder) / "shards", epoch=1, request=tailwise.ExportRequest(workers=1))
write_excluded(catalog, Path(folder) / "excluded.parquet", plan)
verify(catalog)
print(sum(len(rows) for _, (rows, *_) in zip(range(30), Loader(plan, batch_size=8, workers=0))))
"""


def test_a_catalog_may_have_more_parts_than_open_files(fork_python, tmp_path, make_tar, make_embeddings):
    """Each step maps the parts of several columns at once."""
    keys = [f"{row:06d}" for row in range(4 * PARTS)]
    for part in range(PARTS):
        members = [
            member
            for key in keys[4 * part : 4 * part + 4]
            for member in ((f"{key}.jpg", b"bytes"), (f"{key}.txt", f"group {part % 7}".encode()))
        ]
        make_tar(tmp_path / "tars" / f"{part:05d}.tar", members)
    vectors = np.random.default_rng(1).normal(size=(len(keys), 16))
    embeddings = make_embeddings(tmp_path / "embeddings", dict(zip(keys, vectors, strict=True)))
    arguments = [tmp_path / "tars", embeddings, tmp_path, FILES, PARTS]
    process = fork_python(SCRIPT, *arguments, out=tmp_path / "out", err=tmp_path / "err")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "out").read_text().split()[-1] == "240"
