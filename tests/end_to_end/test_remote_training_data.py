"""From an S3 server on the loopback to batches: imported, planned and loaded from there, they are those of the same tars on disk."""

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.transforms.functional import to_tensor

from tailwise import Loader, PlanRequest, import_pool, make_plan
from tailwise.errors import UserError

SIZES = (60, 45, 75, 20)


@pytest.fixture
def bucket(monkeypatch, shards):
    """An S3 bucket that holds the shards: (file system, its URL)."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    import fsspec
    import s3fs

    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    s3fs.S3FileSystem.clear_instance_cache()
    files, name = fsspec.filesystem("s3"), uuid.uuid4().hex
    files.mkdir(name)
    files.put(f"{shards}/*", name)
    yield files, f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def planned(sources, folder):
    catalog = import_pool(sources, folder, workers=1).catalog
    return make_plan(catalog, "p", PlanRequest("random", keep=0.5))


@pytest.fixture
def shards(tmp_path, make_tar, make_image):
    """Tars of samples that all differ."""
    for shard, size in enumerate(SIZES):
        keys = [f"{shard:05d}{number:04d}" for number in range(size)]
        images = [(f"{key}.jpg", make_image(seed=int(key))) for key in keys]
        members = [pair for image in images for pair in (image, (image[0].replace("jpg", "txt"), image[0].encode()))]
        make_tar(tmp_path / "shards" / f"{shard:05d}.tar", members)
        encoded = [{"bytes": image, "path": None} for _, image in images]
        table = pa.table({"key": keys, "image": encoded, "caption": [name for name, _ in images]})
        pq.write_table(table, tmp_path / "shards" / f"images-{shard:05d}.parquet", row_group_size=16)
    return tmp_path / "shards"


def loaded(plan, tmp_path, workers, **options):
    loader = Loader(
        plan, batch_size=16, lanes=4, transform=to_tensor, workers=workers, cache_folder=tmp_path / "cache", **options
    )
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    loader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("names", ["{00000..00003}.tar", "images-{00000..00003}.parquet", "images-*.parquet"])
def test_batches_from_s3_are_those_from_disk(bucket, shards, tmp_path, workers, names):
    here = loaded(planned([f"{shards}/*.tar"], tmp_path / "here"), tmp_path, 0)
    there = loaded(planned([f"{bucket[1]}/{names}"], tmp_path / "there"), tmp_path, workers)
    assert len(here) == len(there) > 10
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.rows, other.rows)
        assert one.texts == other.texts


def test_a_parquet_file_that_is_missing_is_named(bucket, tmp_path):
    with pytest.raises(UserError, match=r"1 of 5 Parquet files .* missing, first .*images-00004.parquet"):
        planned([f"{bucket[1]}/images-{{00000..00004}}.parquet"], tmp_path / "there")


def test_an_object_that_is_gone_is_named_or_replaced(bucket, tmp_path):
    files, url = bucket
    plan = planned([f"{url}/{{00000..00003}}.tar"], tmp_path / "there")
    files.rm(f"{url}/00003.tar")
    with pytest.raises(UserError, match=rf"1 of 4 shards .*{url}/00003.tar"):
        loaded(plan, tmp_path, 0)
    batches = loaded(plan, tmp_path, 0, on_damaged="replace", max_replaced=0.1)
    rows = np.concatenate([batch.rows for batch in batches])
    assert rows.max() < sum(SIZES[:3])
    replaced = [item for batch in batches for item in batch.replaced]
    assert replaced and all(item.row >= sum(SIZES[:3]) for item in replaced)
    assert all(len(batch.rows) == 16 for batch in batches)
