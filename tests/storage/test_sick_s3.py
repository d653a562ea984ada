"""Tars on an S3 server that refuses requests, loses answers and ends them early: import and loader read what is on disk."""

import fsspec
import pytest

from tailwise import Loader, PlanRequest, import_pool, make_plan
from tailwise.storage import remote

SIZES = (20, 12, 16)


@pytest.fixture
def bucket(server, tmp_path, make_pool):
    make_pool(tmp_path / "pool", SIZES)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.put(f"{tmp_path}/pool/*.tar", "pool/tars")
    return "s3://pool/tars"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(4, 100, 0.01, connect_seconds=50, silence_seconds=50))
    monkeypatch.setattr(remote, "_own", remote._Process({}))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the retries are ours


def batches(source, folder):
    report = import_pool(source, folder / "catalog", workers=1)
    assert (report.new_samples, report.rejections.counts) == (sum(SIZES), {})
    plan = make_plan(report.catalog, "p", PlanRequest("random", keep=0.7))
    loader = Loader(plan, batch_size=4, lanes=2, cache_folder=folder / "cache")
    try:
        return [(batch.images, batch.texts) for batch in loader.epoch(0)]
    finally:
        loader.close()


@pytest.mark.parametrize("fault", ["refuse", "lose", "cut"])
def test_what_passes_is_read_past(bucket, between, tmp_path, fault):
    asked, expected = [], batches(str(tmp_path / "pool"), tmp_path / "here")

    def sometimes(method, path):
        """The first request for bytes of a tar, in the import, and one of the loader's."""
        if method != "GET" or not path.endswith("00001.tar"):
            return None
        asked.append(path)
        return fault if len(asked) in {1, 6} else None

    with between(sometimes):
        assert batches(bucket, tmp_path / "there") == expected
    assert len(asked) > 6
