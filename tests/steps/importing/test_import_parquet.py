"""Embeddings from Parquet files of ids and vectors, end to end."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.requests import SourceRequest
from tailwise.sources import parquet_embeddings as module
from tailwise.steps.importing.pool import import_pool

PART_ROWS = 4
STAGE = "image embeddings"


@pytest.fixture
def keys(tmp_path, make_pool):
    return list(itertools.chain(*make_pool(tmp_path / "pool", [4, 3, 2]).values()))


@pytest.fixture
def write(tmp_path):
    """`write(name, ids, vectors, id_column="key", column="embedding")` → the path of a Parquet file."""

    def run(name, ids, vectors, id_column="key", column="embedding", kind=None):
        path = tmp_path / "vectors" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        lists = pa.array(
            [None if row is None else [float(value) for value in row] for row in vectors],
            kind or pa.list_(pa.float32()),
        )
        pq.write_table(pa.table({id_column: ids, column: lists}), path, row_group_size=3)
        return path

    return run


def column(catalog, name):
    return list(itertools.chain(*(catalog.samples(part, [name]).column(0).to_pylist() for part in catalog.parts())))


def check(catalog, vectors, ids=None, name="image"):
    rows = np.concatenate(catalog.embedding_parts(name, catalog.snapshot()))
    for identity, row in zip(ids or column(catalog, "key"), rows, strict=True):
        if identity in vectors:
            np.testing.assert_allclose(row, vectors[identity] / np.linalg.norm(vectors[identity]), atol=2e-3)
        else:
            assert not row.any()


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 8), pa.large_list(pa.float32())])
@pytest.mark.parametrize("batch", [2, 4096])
def test_vectors_go_to_their_keys(run, tmp_path, keys, write, make_vectors, monkeypatch, kind, batch):
    monkeypatch.setattr(module, "BATCH_ROWS", batch)
    vectors = make_vectors(keys[::-1])
    names = list(vectors)
    write("b", names[::2], [vectors[key] for key in names[::2]], kind=kind)
    write("a", names[1::2], [vectors[key] for key in names[1::2]], kind=kind)
    report = run(tmp_path / "pool", tmp_path / "vectors")
    check(report.catalog, vectors)
    assert report.catalog.rejected() is None
    assert not list(report.catalog.folder.rglob("rows-*"))
    assert run(tmp_path / "vectors").columns == []


def test_vectors_by_uid(run, tmp_path, keys, write, make_vectors):
    catalog = run(tmp_path / "pool").catalog
    ids = [uid.hex() for uid in column(catalog, "uid")]
    vectors = make_vectors(ids)
    path = write("a", [uid.upper() for uid in vectors], vectors.values(), "uid")
    run(path)
    check(catalog, vectors, ids)


def test_vectors_by_columns_of_ones_own(run, tmp_path, keys, write, make_vectors):
    vectors = make_vectors(keys)
    write("a", list(vectors), vectors.values(), "name", "vector")
    options = SourceRequest(id_column="name", embedding_column="vector", column="text")
    report = run(tmp_path / "pool", tmp_path / "vectors", options=options)
    check(report.catalog, vectors, name="text")
    named = SourceRequest(id_column="name", embedding_column="vector", column="dino")
    with pytest.raises(UserError, match="`column` 'dino' is new: say with `of` image or text"):
        run(tmp_path / "vectors", options=named)
    run(tmp_path / "vectors", options=replace(named, of="image"))
    check(report.catalog, vectors, name="dino")
    assert json.loads((report.catalog.embedding_folder("dino") / "column.json").read_text())["modality"] == "image"


def test_vectors_by_tar_and_key(run, tmp_path, make_pool, write, make_vectors):
    made = make_pool(tmp_path / "pool" / "a", [2]) | make_pool(tmp_path / "pool" / "b", [2])
    names = [f"elsewhere/{path.parent.name}/{path.name}/{key}.jpg" for path, keys in made.items() for key in keys]
    vectors = make_vectors(names)
    write("a", names, vectors.values(), "image_path")
    check(run(tmp_path / "pool", tmp_path / "vectors").catalog, vectors, names)


def test_faults_of_rows(run, tmp_path, keys, write, make_vectors, rejected_counts):
    vectors = dict(make_vectors(keys))
    bad = {keys[0]: None, keys[1]: np.ones(3), keys[2]: np.full(8, np.nan), keys[3]: np.zeros(8)}
    rows = [bad.get(key, vectors[key]) for key in keys]
    write("a", [*keys, "stranger", keys[5], None], [*rows, np.ones(8), np.ones(8), np.ones(8)])
    catalog = run(tmp_path / "pool", tmp_path / "vectors").catalog
    check(catalog, {key: vectors[key] for key in keys[4:]})
    assert rejected_counts(catalog) == {
        (STAGE, "no vector of the file's width"): 2,
        (STAGE, "sample without embedding"): 2,
        (STAGE, "NaN or Inf"): 1,
        (STAGE, "zero norm"): 1,
        (STAGE, "embedding without sample"): 2,
        (STAGE, "duplicate embedding"): 1,
    }


@pytest.mark.parametrize(("fault", "reason"), [("cut", "unreadable embeddings"), ("width", "wrong dimension")])
def test_whole_files_that_can_not_be_used(run, tmp_path, keys, write, make_vectors, rejected_counts, fault, reason):
    vectors = make_vectors(keys)
    write("a", keys[:6], [vectors[key] for key in keys[:6]])
    path = write("b", keys[6:], [np.ones(5)] * 3)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    catalog = run(tmp_path / "pool", tmp_path / "vectors").catalog
    check(catalog, {key: vectors[key] for key in keys[:6]})
    assert (STAGE, reason) in rejected_counts(catalog)


def test_a_damaged_row_group(run, tmp_path, keys, write, make_vectors, rejected_counts):
    vectors = make_vectors(keys)
    write("a", keys[:3], [vectors[key] for key in keys[:3]])
    path = write("b", keys[3:], [vectors[key] for key in keys[3:]])
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    catalog = run(tmp_path / "pool", tmp_path / "vectors").catalog
    check(catalog, {key: vectors[key] for key in keys[:3]})
    assert (STAGE, "unreadable embeddings") in rejected_counts(catalog)


def test_nothing_matches(run, tmp_path, keys, write):
    write("a", ["x", "y"], [np.ones(4)] * 2)
    with pytest.raises(UserError, match=r"none of the embeddings in .*first embedding's key is 'x'"):
        run(tmp_path / "pool", tmp_path / "vectors")


def test_an_interrupted_join_goes_on(run, tmp_path, keys, write, make_vectors, tree_bytes):
    vectors = make_vectors(keys)
    write("a", keys, vectors.values())
    sources = [str(tmp_path / "pool"), str(tmp_path / "vectors")]
    whole = tree_bytes(import_pool(sources, tmp_path / "whole", workers=1, part_rows=4).catalog.folder)

    class Interrupted(BaseException):
        pass

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == ("image embeddings", 1):
                raise Interrupted
            yield item

    with pytest.raises(Interrupted):
        run(*sources, context=Context(track))
    run(*sources)
    assert tree_bytes(tmp_path / "catalog") == whole
