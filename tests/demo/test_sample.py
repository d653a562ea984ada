"""A bounded sample of a user's pool."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.cli import app
from tailwise.context import Context
from tailwise.demo.run import Tools, run_on_pool
from tailwise.demo.sample import take_sample
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool


def imported(sample, folder):
    catalog = import_pool(sample.sources, folder, workers=1).catalog
    return [key for part in catalog.parts() for key in catalog.samples(part, ["key"]).column(0).to_pylist()]


@pytest.mark.parametrize(("samples", "files"), [(3, 1), (10, 1), (25, 3), (30, 3), (1000, 3)])
def test_no_more_samples_than_asked_for_and_no_tar_is_changed(tmp_path, make_pool, samples, files):
    pool = make_pool(tmp_path / "shards", [10, 10, 10])
    before = {path: path.read_bytes() for path in pool}
    sample = take_sample([str(tmp_path / "shards")], samples, tmp_path / "cut")
    assert (sample.samples, sample.files, sample.pool_files) == (min(samples, 30), files, 3)
    keys = imported(sample, tmp_path / "catalog")
    assert len(keys) == min(samples, 30)
    assert set(keys) <= {key for keys in pool.values() for key in keys}
    assert {path: path.read_bytes() for path in pool} == before
    assert len(list((tmp_path / "cut").glob("*.tar"))) == (1 if samples in {3, 25} else 0)


def test_embeddings_come_with_the_tars(tmp_path, make_pool, make_partition):
    pool = make_pool(tmp_path / "pool", [10, 10])
    keys = [key for keys in pool.values() for key in keys]
    make_partition(tmp_path / "pool" / "embeddings", 0, keys, [[1.0, number] for number in range(20)])
    sample = take_sample([str(tmp_path / "pool")], 15, tmp_path / "cut")
    assert sample.has_images
    assert sample.has_embeddings
    made = import_pool(sample.sources, tmp_path / "catalog", workers=1)
    assert [column.embedded for column in made.columns] == [15]


def test_metadata_without_images(tmp_path):
    for number in range(3):
        table = pa.table({"uid": [f"{number * 8 + row:032x}" for row in range(8)], "text": ["a caption"] * 8})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    sample = take_sample([str(tmp_path)], 16, tmp_path / "cut")
    assert (sample.samples, sample.files, sample.has_images) == (16, 2, False)


def test_embeddings_alone_and_remote_pools_are_refused(tmp_path, make_partition):
    make_partition(tmp_path / "embeddings", 0, ["a"], [[1.0, 0.0]])
    with pytest.raises(UserError, match="holds embeddings and no shards: add their folder"):
        take_sample([str(tmp_path / "embeddings")], 10, tmp_path / "cut")


def test_a_pool_that_is_none_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    (tmp_path / "empty").mkdir()
    told = {"bad.tar": "holds no usable samples", "empty": "nothing to import", "nowhere": "does not exist"}
    for path, message in told.items():
        with pytest.raises(UserError, match=message):
            run_on_pool(tmp_path / "demo", [path], 1000, Tools(lambda _: "", print, Context()))
    assert not (tmp_path / "demo").exists()


def test_options_that_do_nothing_are_refused():
    for words in (["pool", "--images", "2000"], ["--samples", "2000"]):
        found = CliRunner().invoke(app, ["demo", *words])
        assert "does nothing with" in str(found.exception)
