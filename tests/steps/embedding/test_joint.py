"""Joint columns: their cosine is the weighted mean of the cosines, and every step takes them as any other column."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.embeddings import check_column
from tailwise.catalog.files import read_record
from tailwise.errors import ConflictError, UserError
from tailwise.requests import ClusterRequest, DedupRequest, EmbedRequest, FilterRequest, SourceRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding import joint
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.why import why

REQUEST = EmbedRequest(encoder="joint:image=3,text=1", column="joint")
DIMENSIONS = {"image": 8, "text": 5}


@pytest.fixture
def columns(tmp_path, make_pool):
    """`columns(shards)`: imports shards of 20 samples and fills both columns; sample 7 has no text."""

    def grow(shards):
        make_pool(tmp_path / "pool", [20] * shards)
        catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=20).catalog
        keys = [key for part in catalog.parts() for key in catalog.samples(part)["key"].to_pylist()]
        for name, dimension in DIMENSIONS.items():
            rows = np.random.default_rng(dimension).normal(size=(len(keys), dimension)).astype(np.float32)
            has = np.arange(len(keys)) != (7 if name == "text" else -1)
            table = pa.table({"key": np.array(keys)[has], "embedding": list(rows[has])})
            pq.write_table(table, tmp_path / f"{name}.parquet")
            options = SourceRequest(column=name)
            import_pool([str(tmp_path / f"{name}.parquet")], catalog.folder, options=options, max_rejected=1.0)
        return catalog

    return grow


def unit(catalog, name):
    x = np.concatenate(catalog.embedding_parts(name, catalog.snapshot())).astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def test_the_cosine_is_the_weighted_mean(columns, monkeypatch):
    monkeypatch.setattr(joint, "CHUNK_ROWS", 7)
    catalog = columns(2)
    report = embed(catalog, REQUEST)
    assert (report.embedded, report.lacking, report.columns[0].dimension) == (39, 40, 13)
    x, image, text = (unit(catalog, name) for name in ("joint", "image", "text"))
    has = np.arange(40) != 7
    assert not x[7].any()
    expected = 0.75 * image @ image.T + 0.25 * text @ text.T
    np.testing.assert_allclose((x @ x.T)[has][:, has], expected[has][:, has], atol=2e-3)
    record = read_record(catalog.embedding_folder("joint") / "column.json")
    assert record["modality"] == "joint"
    assert {name: made["weight"] for name, made in record["settings"].items()} == {"image": 0.75, "text": 0.25}


def test_new_shards_and_filled_parts_are_joined_again(columns):
    catalog = columns(1)
    embed(catalog, REQUEST)
    assert embed(catalog, REQUEST).lacking == 0
    grown = columns(2)
    assert embed(grown, REQUEST).lacking == 20
    path = grown.folder.parent / "late.parquet"
    key = grown.samples(grown.parts()[0])["key"][7].as_py()
    pq.write_table(pa.table({"key": [key], "embedding": [np.ones(5, np.float32)]}), path)
    import_pool([str(path)], grown.folder, options=SourceRequest(column="text"), max_rejected=1.0)
    report = embed(grown, REQUEST)
    assert (report.lacking, report.embedded) == (20, 20)


def test_all_steps_take_it(columns):
    catalog = columns(2)
    embed(catalog, REQUEST)
    cluster(catalog, ClusterRequest(k=3, column="joint"))
    assert Clustering.open(catalog, "main").centroids.shape == (3, 13)
    dedup(catalog, DedupRequest(epsilon=0.5))
    dedup(catalog, DedupRequest(epsilon=0.5, column="image", name="images"))
    listed = {item["column"]: item for item in status(catalog)["embeddings"]}
    assert (listed["joint"]["of"], listed["joint"]["encoder"], listed["joint"]["embedded"]) == (
        "joint",
        REQUEST.encoder,
        39,
    )
    assert why(catalog, "000000007")["samples"][0]["embeddings"] == {"image": True, "text": False, "joint": False}


@pytest.mark.parametrize(
    ("encoder", "column", "message"),
    [
        ("joint:image=0.5", "joint", "give at least two columns, each once"),
        ("joint:image=0.5,text", "joint", "give at least two columns, each once"),
        ("joint:image=0.5,image=0.5", "joint", "give at least two columns, each once"),
        ("joint:image=0.5,text=0", "joint", "with weights above 0"),
        ("joint:image=0.5,dino=0.5", "joint", "unknown column 'dino'"),
        ("joint:image=0.5,text=0.5", "image", "give the joint column another name"),
    ],
)
def test_what_is_refused(columns, encoder, column, message):
    with pytest.raises(UserError, match=message):
        embed(columns(1), EmbedRequest(encoder=encoder, column=column))


def test_it_stays_what_it_is(columns, tmp_path):
    catalog = columns(1)
    embed(catalog, REQUEST)
    with pytest.raises(UserError, match="encoders can't be mixed"):
        embed(catalog, EmbedRequest(encoder="joint:image=1,text=1", column="joint"))
    with pytest.raises(UserError, match="has no joint side"):
        embed(catalog, EmbedRequest(encoder="pixels", column="joint", workers=1))
    with pytest.raises(ConflictError, match="column 'joint' is of joint"):
        embed(catalog, EmbedRequest(encoder="pixels", column="joint", of="image", workers=1))
    with pytest.raises(UserError, match="column 'joint' is of joint, not of image"):
        filter_samples(catalog, FilterRequest("clip-score", minimum=0.1, image="joint"))
    with pytest.raises(UserError, match="column 'joint' is of joint, not of image"):
        dedup(catalog, DedupRequest(against=(str(tmp_path),), epsilon=0.1, column="joint"))
    with pytest.raises(UserError, match="`workers` does nothing with joint:image"):
        embed(catalog, EmbedRequest(encoder=REQUEST.encoder, column="joint", workers=1))
    assert check_column(catalog, "joint") == "joint"


def test_the_command(columns, run_tailwise):
    catalog = columns(1)
    command = ["embed", catalog.folder, "--encoder", "joint:image=0.5,text=0.5", "--column", "both-sides"]
    assert json.loads(run_tailwise(*command, "--json").stdout)["embedded"] == 19
    assert "both-sides embeddings: 0 of 0 samples" in run_tailwise(*command).stdout
