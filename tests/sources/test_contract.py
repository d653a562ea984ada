"""The contract of sources: what holds for every row of the table. A new source needs one entry in `write`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.errors import UserError
from tailwise.shards.containers import CONTAINERS
from tailwise.sources import SOURCES, find
from tailwise.steps.importing.pool import import_pool

DIMENSION = 6
SHARDS = (5, 3, 4)
# Formats that are rows of CONTAINERS alone: tests/shards/test_containers.py has their contract.
NAMES = [name for name in SOURCES if name in {"webdataset", "datacomp"} or name not in CONTAINERS]
EMBEDDINGS = [name for name in NAMES if name not in {"webdataset", "urls"}]


@pytest.fixture
def pool(tmp_path, make_pool):
    """[(name of the tar, key)] of all samples; the tars are in `tmp_path / "tars"`."""
    made = make_pool(tmp_path / "tars", SHARDS)
    return [(path.name, key) for path, keys in made.items() for key in keys]


@pytest.fixture
def write(tmp_path, pool, make_partition, make_metadata):
    """`write(name, rows, files=2)` writes a source whose vector of sample i is rows[i], dealt out to files → its path."""

    def partitions(folder, rows, files, indices):
        names = [f"tars/{tar}/{key}.jpg" if indices else key for tar, key in pool]
        for number in range(files):
            mine = slice(number, None, files)
            make_partition(folder, number, names[mine], rows[mine])
            if indices:
                np.save(folder / "img_emb" / f"img_emb_{number}_indices.npy", np.zeros((len(names[mine]), 1), np.int64))

    def parquet(folder, rows, files):
        folder.mkdir()
        for number in range(files):
            mine = slice(number, None, files)
            vectors = pa.array(list(rows[mine]), pa.list_(pa.float32()))
            keys = [key for _, key in pool[mine]]
            pq.write_table(pa.table({"key": keys, "embedding": vectors}), folder / f"{number}.parquet")

    def metadata(folder, rows, files):
        for number in range(files):
            at = np.arange(len(pool))[number::files]
            arrays = {"l14_img": rows[at], "l14_txt": rows[at]}
            make_metadata(folder, f"{number}", [f"{row:032x}" for row in at], arrays)

    def urls(folder, rows, files):
        folder.mkdir()
        for number in range(files):
            keys = [key for _, key in pool[number::files]]
            table = {"URL": [f"https://example.org/{key}.jpg" for key in keys], "TEXT": keys}
            pq.write_table(pa.table(table), folder / f"{number}.parquet")

    writers = {
        "webdataset": lambda *_: None,
        "clip-retrieval": lambda folder, rows, files: partitions(folder, rows, files, False),
        "dynamics": lambda folder, rows, files: partitions(folder, rows, files, True),
        "datacomp": metadata,
        "urls": urls,
        "parquet": parquet,
    }
    assert [*writers] == NAMES

    def run(name, rows, files=2):
        folder = tmp_path / ("tars" if name == "webdataset" else f"{name}-{files}")
        writers[name](folder, np.asarray(rows, np.float32), files)
        return folder

    return run


@pytest.fixture
def rows():
    """A vector for each sample."""
    return np.random.default_rng(3).normal(size=(sum(SHARDS), DIMENSION)).astype(np.float32)


def read(catalog, name):
    """Row of the catalog's embeddings by the number of the sample, as it was written."""
    found = np.concatenate([*catalog.embedding_parts("image", catalog.snapshot())]).astype(np.float64)
    uids = [uid for part in catalog.parts() for uid in catalog.samples(part, ["uid"]).column(0).to_pylist()]
    numbers = [int.from_bytes(uid, "big") for uid in uids] if name == "datacomp" else range(len(uids))
    return dict(zip(numbers, found, strict=True))


def brought(name, tmp_path):
    """The sources of an import besides the source itself."""
    return [] if name in {"webdataset", "datacomp"} else [str(tmp_path / "tars")]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_by_its_name_and_without_it_and_each_file_once(write, rows, name):
    folder = str(write(name, rows))
    named = find([folder], format_name=name)
    assert named == find([folder])
    assert named == find([folder, folder])
    assert named == find([f"{folder}/"])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_refused_with_what_it_expects(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to import") as refused:
        find([str(tmp_path / "empty")], format_name=name)
    assert SOURCES[name].given in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_exist_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(UserError, match="absent"):
        find([str(tmp_path / "absent")], format_name=name)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize(("files", "part_rows"), [(1, 100), (3, 4)])
def test_each_sample_gets_its_own_vector_however_files_and_parts_are_cut(write, rows, tmp_path, name, files, part_rows):
    source = write(name, rows, files)
    sources = [str(source), *brought(name, tmp_path)]
    catalog = import_pool(sources, tmp_path / "catalog", workers=1, part_rows=part_rows).catalog
    found = read(catalog, name)
    assert found.keys() == {*range(len(rows))}
    for number, row in found.items():
        np.testing.assert_allclose(row, rows[number] / np.linalg.norm(rows[number]), atol=2e-3)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_vector_that_is_unfit_costs_its_sample_alone(write, rows, tmp_path, name):
    rows[4] = np.nan
    rows[7] = 0
    sources = [str(write(name, rows)), *brought(name, tmp_path)]
    result = import_pool(sources, tmp_path / "catalog", workers=1, max_rejected=1.0)
    found = read(result.catalog, name)
    for number, row in found.items():
        if number in {4, 7}:
            assert not np.isfinite(row).all() or not row.any()
        else:
            np.testing.assert_allclose(row, rows[number] / np.linalg.norm(rows[number]), atol=2e-3)
    reasons = {
        row["reason"]: row["rows"]
        for row in result.catalog.rejected().to_pylist()
        if row["stage"] == "image embeddings"
    }
    assert sum(reasons.values()) >= 2
