"""A pool with all that shards may hold, and plans that draw its samples up to three times."""

import json
import shutil
import tarfile
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

SIZES = {"a": (60, 45), "b": (70, 25)}  # samples of each tar; keys of a and b clash
COPIES = (1, 0, 2, 3, 1)  # of the rows, in turn


def _jsons(folder, shard, row, make_uid):
    """What a sample's JSON is, or None for none."""
    if folder == "a" and shard == 0:  # as img2dataset writes it
        return {"key": f"{row:04d}", "uid": make_uid(row), "url": f"http://x/ä{row}", "width": 8, "height": 8, "n": 1.5}
    if folder == "b" and shard == 0:
        return [None, "[1, 2]", "{broken", '{"width": 8, "height": 6, "uid": "no uid"}'][row % 4]
    if folder == "b":
        return {"long": "x" * 6000, "copy": "theirs"}  # so that image and caption lie far apart
    return None


@pytest.fixture(scope="session")
def _mixed_source(tmp_path_factory, make_tar, make_image):
    folder = tmp_path_factory.mktemp("mixed")
    for name, sizes in SIZES.items():
        for shard, size in enumerate(sizes):
            members, rows = [], []
            kind, extension = [("JPEG", "jpg"), ("WEBP", "webp"), ("PNG", "png"), ("JPEG", "jpeg")][
                2 * (name == "b") + shard
            ]
            for row in range(size):
                key = f"{shard:05d}{row:04d}"
                image = make_image(1000 * ord(name) + 100 * shard + row, kind)
                sample = {extension: image, "txt": f"{name} {shard} {row} — ß\n".encode() if row else b""}
                description = _jsons(name, shard, row, lambda row: f"{row + 1:032x}")
                if description is not None:
                    text = description if isinstance(description, str) else json.dumps(description)
                    sample["json"] = text.encode()
                order = sorted(sample) if name == "a" or shard else sorted(sample, reverse=True)
                members += [(f"{key}.{extension}", sample[extension]) for extension in order]
                rows.append(
                    {"key": key, "status": "success", "width": 8, "height": 7, "score": row / 8, "caption": "…"}
                )
            make_tar(folder / name / f"{shard:05d}.tar", members)
            if (name, shard) == ("a", 1):
                pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{shard:05d}.parquet")
    catalog = import_pool([str(folder / name) for name in SIZES], folder / "catalog", workers=1, part_rows=105).catalog
    assert [part.rows for part in catalog.parts()] == [105, 95]
    uids = [uid.hex() for part in catalog.parts() for uid in catalog.samples(part, ["uid"]).column(0).to_pylist()]
    table = {"uid": uids, "copies": [COPIES[row % 5] for row in range(200)], "once": [1] * 200}
    pq.write_table(pa.table(table), folder / "rates.parquet")
    return folder


@pytest.fixture
def mixed(_mixed_source, tmp_path):
    """A catalog of 200 samples in 4 tars of the test's own, in `tmp_path/mixed/a` and `…/b`, in 2 parts; keys of a and b clash.

    Images of all kinds, JSON of all kinds or none; the first part has a column "score", null but for its second tar.
    """
    shutil.copytree(_mixed_source, tmp_path / "mixed")
    catalog = Catalog.open(tmp_path / "mixed" / "catalog")
    catalog.relocate(str(_mixed_source), str(tmp_path / "mixed"))
    return catalog


@pytest.fixture
def thrice(mixed):
    """A plan of `mixed` that draws 280 copies, 0 … 3 of a sample, in every epoch."""
    return make_plan(
        mixed, "thrice", PlanRequest("rates", rates=mixed.folder.parent / "rates.parquet", rate_column="copies")
    )


@pytest.fixture
def once(mixed):
    """A plan of `mixed` that draws every sample once, in every epoch."""
    return make_plan(
        mixed, "once", PlanRequest("rates", rates=mixed.folder.parent / "rates.parquet", rate_column="once")
    )


@pytest.fixture(scope="session")
def read_tars():
    """`read_tars(folder)` → {(name of the tar, key): {extension: content}} of all tars, in order, by the standard library."""

    def read(folder):
        samples = defaultdict(dict)
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, extension = member.name.split(".", 1)
                    samples[path.name, key][extension] = tar.extractfile(member).read()
        return dict(samples)

    return read


@pytest.fixture(scope="session")
def sources_of(read_tars):
    """`sources_of(catalog)` → for each row: uid, shard, key, and what its tar holds of it."""

    def read(catalog):
        paths = catalog.shards()["path"].to_pylist()
        rows = []
        tars = {}
        for part in catalog.parts():
            for sample in catalog.samples(part).to_pylist():
                folder, _, name = paths[sample["shard"]].rpartition("/")
                if folder not in tars:
                    tars[folder] = read_tars(catalog.folder.parent / folder.rpartition("/")[2])
                rows.append({**sample, "uid": sample["uid"].hex(), "members": tars[folder][name, sample["key"]]})
        return rows

    return read


@pytest.fixture(scope="session")
def make_rates_parquet():
    """`make_rates_parquet(catalog, rates)` → a plan "rates" of one rate per row."""

    def make(catalog, rates):
        uids = [uid.hex() for part in catalog.parts() for uid in catalog.samples(part, ["uid"]).column(0).to_pylist()]
        path = catalog.folder.parent / "rates.parquet"
        pq.write_table(pa.table({"uid": uids, "rate": rates}), path)
        return make_plan(catalog, "rates", PlanRequest("rates", rates=path))

    return make
