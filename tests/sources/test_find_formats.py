"""Which format a source is: `auto` tells them apart by what is in them."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.embeddings import MODALITIES
from tailwise.errors import UserError
from tailwise.requests import ImportRequest, SourceRequest
from tailwise.sources import SOURCES, find
from tailwise.sources.datacomp import EMBEDDINGS
from tailwise.sources.parquet_embeddings import kind_of

UIDS = [f"{number:032x}" for number in range(3)]
ARRAYS = {"l14_img": np.ones((3, 4), np.float16), "l14_txt": np.ones((3, 4), np.float16)}


def found(*sources, **options):
    return find([str(source) for source in sources], **options)


def summary(what):
    """Names of files by what they were found to be."""
    return {
        "tars": sorted(path.rsplit("/", 1)[1] for path in what.tars),
        "metadata": sorted(path.rsplit("/", 1)[1] for path in what.metadata),
        "embeddings": {
            column: [file.path.name for file in files] for column, files in what.embeddings.items() if files
        },
        "ids": [file.path.name for file in what.cluster_ids],
    }


NOTHING = {"tars": [], "metadata": [], "embeddings": {}, "ids": []}


@pytest.fixture
def write_vectors(tmp_path):
    def run(path, **columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"key": ["a"], "embedding": pa.array([[1.0, 2.0]], pa.list_(pa.float32())), **columns}
        pq.write_table(pa.table({name: value for name, value in table.items() if value is not None}), path)
        return path

    return run


@pytest.fixture
def make_dynamics(make_partition):
    def write(folder):
        make_partition(folder, 0, ["x/0.tar/a.jpg"], np.ones((1, 4), np.float32))
        np.save(folder / "img_emb" / "img_emb_0_indices.npy", np.zeros((1, 1), np.int64))
        return folder

    return write


def test_the_help_names_all_formats():
    for name in ("auto", *SOURCES):
        assert re.search(rf"\b{name}\b", ImportRequest.__annotations__["format_name"])
    for name in EMBEDDINGS:
        assert re.search(rf"\b{name}\b", SourceRequest.__annotations__["embedding"])
    for name in MODALITIES:
        assert re.search(rf"\b{name}\b", SourceRequest.__annotations__["column"])


@pytest.mark.parametrize("place", ["", "metadata", "metadata/small", "metadata/xlarge/0001"])
def test_metadata_in_the_layouts_that_datacomp_has(tmp_path, make_metadata, place):
    for name in ("b", "a"):
        make_metadata(tmp_path / place, name, UIDS, ARRAYS)
    expected = {
        "metadata": ["a.parquet", "b.parquet"],
        "embeddings": {"image": ["a.npz", "b.npz"], "text": ["a.npz", "b.npz"]},
    }
    assert summary(found(tmp_path)) == {**NOTHING, **expected}
    assert [file.member for file in found(tmp_path).embeddings["text"]] == ["l14_txt"] * 2
    chosen = found(tmp_path, options=SourceRequest(embedding="b32"))
    assert [file.member for file in chosen.embeddings["image"]] == ["b32_img"] * 2


def test_metadata_with_image_embeddings_alone(tmp_path, make_metadata):
    for name in ("b", "a"):
        make_metadata(tmp_path, name, UIDS, {"l14_img": ARRAYS["l14_img"]})
    assert list(found(tmp_path).embeddings) == ["image"]
    make_metadata(tmp_path, "c", UIDS, ARRAYS)  # some files have both
    assert list(found(tmp_path).embeddings) == ["image", "text"]


@pytest.mark.parametrize("name", ["a.parquet", "a.npz", "*.parquet", "{a..a}.npz", "[a]*.parquet"])
def test_single_files_and_patterns(tmp_path, make_metadata, name):
    make_metadata(tmp_path, "a", UIDS, ARRAYS)
    expected = {"metadata": ["a.parquet"], "embeddings": {"image": ["a.npz"], "text": ["a.npz"]}}
    assert summary(found(tmp_path / name)) == {**NOTHING, **expected}


def test_metadata_without_any_npz_has_no_embeddings(tmp_path, make_metadata):
    make_metadata(tmp_path, "a", UIDS)
    assert summary(found(tmp_path)) == {**NOTHING, "metadata": ["a.parquet"]}
    make_metadata(tmp_path, "b", UIDS, ARRAYS)
    assert summary(found(tmp_path))["embeddings"]["image"] == ["a.npz", "b.npz"]  # now that of a is missing


def test_each_table_is_looked_at_once(tmp_path, make_metadata, monkeypatch):
    looked = []
    monkeypatch.setattr("tailwise.sources.kind_of", lambda path, options: looked.append(path) or kind_of(path, options))
    for name in ("a", "b"):
        make_metadata(tmp_path, name, UIDS)
    assert summary(found(tmp_path)) == {**NOTHING, "metadata": ["a.parquet", "b.parquet"]}
    assert looked == [tmp_path / "a.parquet", tmp_path / "b.parquet"]


def test_damaged_files_among_metadata_are_its_own(tmp_path, make_metadata):
    make_metadata(tmp_path, "a", UIDS)
    (tmp_path / "b.parquet").write_bytes(b"junk")
    assert summary(found(tmp_path)) == {**NOTHING, "metadata": ["a.parquet", "b.parquet"]}


def test_a_downloaded_pool_has_tars_and_metadata(tmp_path, make_metadata, make_pool):
    """img2dataset's sidecars, which name uid and text too, are no metadata."""
    make_metadata(tmp_path / "metadata", "a", UIDS)
    (tar,) = make_pool(tmp_path / "shards", [2])
    make_metadata(tmp_path / "shards", tar.stem, UIDS)
    make_metadata(tmp_path / "elsewhere", "00007", UIDS, key=["a", "b", "c"], status=["success"] * 3)
    assert summary(found(tmp_path)) == {**NOTHING, "tars": [tar.name], "metadata": ["a.parquet"]}


def test_hidden_folders_are_passed_over(tmp_path, make_metadata):
    make_metadata(tmp_path / "metadata", "a", UIDS)
    make_metadata(tmp_path / ".cache" / "metadata", "b", UIDS)
    assert summary(found(tmp_path)) == {**NOTHING, "metadata": ["a.parquet"]}


def test_clip_retrieval_is_no_metadata(tmp_path, make_partition):
    make_partition(tmp_path, 0, ["a"], np.ones((1, 4)))
    path = tmp_path / "metadata" / "metadata_0.parquet"
    pq.write_table(pa.table({"image_path": ["a"], "uid": ["u"], "text": ["t"], "embedding": [[1.0]]}), path)
    assert summary(found(tmp_path)) == {**NOTHING, "embeddings": {"image": ["img_emb_0.npy"]}}


def test_dynamics(tmp_path, make_dynamics):
    folder = make_dynamics(tmp_path)
    expected = {**NOTHING, "embeddings": {"image": ["img_emb_0.npy"]}, "ids": ["img_emb_0_indices.npy"]}
    assert (
        summary(found(folder))
        == summary(found(folder, folder))
        == summary(found(folder, format_name="dynamics"))
        == expected
    )
    assert summary(found(folder, format_name="clip-retrieval"))["ids"] == []


def test_parquet_embeddings(tmp_path, write_vectors):
    path = write_vectors(tmp_path / "deep" / "v.parquet", uid=["u"], text=["t"])
    expected = {**NOTHING, "embeddings": {"image": ["v.parquet"]}}
    assert summary(found(tmp_path)) == summary(found(path)) == expected
    text = found(tmp_path, options=SourceRequest(column="text", id_column="text"))
    assert summary(text)["embeddings"] == {"text": ["v.parquet"]}
    assert text.embeddings["text"][0].id_column == "text"


def test_other_tables_are_nothing(tmp_path, write_vectors):
    write_vectors(tmp_path / "v.parquet", embedding=None)
    with pytest.raises(UserError, match=r"nothing to import.*no known format, first .*v.parquet \(name its columns"):
        found(tmp_path)
    write_vectors(tmp_path / "v.parquet", vector=pa.array([[1.0]]), embedding=None)
    with pytest.raises(UserError, match="nothing to import"):
        found(tmp_path)
    assert summary(found(tmp_path, options=SourceRequest(embedding_column="vector")))["embeddings"] == {
        "image": ["v.parquet"]
    }


@pytest.mark.parametrize("table", [{"jpg": [b"image"], "caption": ["one"]}, {"url": ["https://a"], "caption": ["a"]}])
def test_tables_beside_good_ones_are_named(tmp_path, table):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    pq.write_table(pa.table({"image": ["b.jpg"], "caption": ["one"]}), tmp_path / "c.parquet")
    unreadable, other = found(tmp_path).notes
    assert "1 × unreadable Parquet file, first" in unreadable and "b.parquet" in unreadable
    assert "1 × Parquet file of no known format" in other and "c.parquet" in other
    with pytest.raises(UserError, match=r"nothing to import.*unreadable Parquet file.*b.parquet"):
        found(tmp_path / "b.parquet")


@pytest.mark.parametrize("name", list(SOURCES))
def test_each_format_takes_its_own_alone(tmp_path, make_metadata, make_pool, make_dynamics, write_vectors, name):
    make_pool(tmp_path / "t", [1])
    make_metadata(tmp_path / "m", "a", UIDS)
    make_dynamics(tmp_path / "d")
    write_vectors(tmp_path / "v" / "v.parquet")
    (tmp_path / "u").mkdir()
    pq.write_table(pa.table({"url": ["https://a"], "caption": ["a"]}), tmp_path / "u" / "u.parquet")
    (tmp_path / "i").mkdir()
    pq.write_table(pa.table({"jpg": [b"image"], "caption": ["one"]}), tmp_path / "i" / "i.parquet")
    (tmp_path / "f").mkdir()
    for file in ("1.jpg", "1.txt"):
        (tmp_path / "f" / file).write_bytes(b"x")
    homes = {"files": "f", "webdataset": "t", "parquet-images": "i", "datacomp": "m", "urls": "u", "parquet": "v"}
    home = homes.get(name, "d")
    for folder in ("t", "m", "d", "u", "v", "i", "f"):
        if folder == home:
            assert summary(found(tmp_path / folder, format_name=name)) != NOTHING
        else:
            with pytest.raises(UserError, match="nothing to import"):
                found(tmp_path / folder, format_name=name)


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ({"embedding": "b32"}, "`embedding` b32 does nothing"),
        ({"clustering": "c"}, "`clustering` c does nothing"),
        ({"id_column": "key"}, "`id_column` key does nothing"),
        ({"embedding_column": "e"}, "`embedding_column` e does nothing"),
        ({"column": "text"}, "`column` text does nothing"),
        ({"of": "text"}, "`of` text does nothing"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, make_pool, options, saying):
    make_pool(tmp_path, [1])
    with pytest.raises(UserError, match=saying):
        found(tmp_path, options=SourceRequest(**options))


@pytest.mark.parametrize("options", [{"embedding": "l15"}, {"column": "../sound"}, {"clustering": "../x"}])
def test_values_that_nobody_knows_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options.values()))):
        found("anywhere", options=SourceRequest(**options))


def test_remote_tables_are_nothing():
    with pytest.raises(UserError, match="nothing to import"):
        found("memory://metadata/a.parquet")


def test_tables_below_tars_with_sidecars(tmp_path, make_pool, write_vectors):
    for path in make_pool(tmp_path, [1]):
        pq.write_table(pa.table({"key": ["a"]}), path.with_suffix(".parquet"))
    write_vectors(tmp_path / "embeddings" / "e.parquet")
    assert summary(found(tmp_path)) == {**NOTHING, "tars": ["00000.tar"], "embeddings": {"image": ["e.parquet"]}}


def test_tables_missing_from_a_pattern_are_refused_by_name(tmp_path, write_vectors):
    for name in ("0", "2"):
        write_vectors(tmp_path / "odd[1]" / f"{name}.parquet")
    assert summary(found(tmp_path / "odd[1]" / "*.parquet"))["embeddings"] == {"image": ["0.parquet", "2.parquet"]}
    with pytest.raises(UserError, match=r"1 of 3 .* missing.*1\.parquet"):
        found(tmp_path / "odd[1]" / "{0..2}.parquet")
