"""Opening, creating and relocating catalogs; snapshots, parts and names."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.catalog import FORMAT
from tailwise.catalog.files import read_record, write_record
from tailwise.catalog.kinds import check_name
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool

# --- opening and creating -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True])
def test_opening_what_is_no_catalog(tmp_path, made):
    path = tmp_path / "x"
    if made:
        path.mkdir()
    with pytest.raises(UserError, match=r"is no catalog.*tailwise import"):
        Catalog.open(path)
    assert path.exists() == made


def test_opening_another_format_says_both(tmp_path):
    (tmp_path / "catalog.json").write_text(json.dumps({"format": FORMAT + 1}))
    for use in (Catalog.open, Catalog.create):
        with pytest.raises(UserError, match=f"format {FORMAT + 1}, this tailwise reads {FORMAT}"):
            use(tmp_path)


@pytest.mark.parametrize("use", [Catalog.open, Catalog.create])
@pytest.mark.parametrize(
    "url", ["https://host/catalog", "file:///tmp/catalog", "s3://", "s3://bucket/catalog?versionId=1"]
)
def test_other_urls_are_refused(use, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no place for a catalog: give a local folder, or a URL of s3://"):
        use(url)
    with pytest.raises(UserError, match="give credentials by environment variables") as caught:
        use("s3://key:very-secret@bucket/catalog")
    assert "very-secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_create_then_open(tmp_path, tree_bytes):
    assert Catalog.create(tmp_path / "a" / "b").folder == tmp_path / "a" / "b"
    before = tree_bytes(tmp_path)
    assert Catalog.create(tmp_path / "a" / "b").snapshots() == []
    assert Catalog.open(str(tmp_path / "a" / "b")).rejected() is None
    assert tree_bytes(tmp_path) == before


def test_a_folder_whose_name_looks_like_a_column_value(tmp_path, make_tar):
    make_tar(tmp_path / "pool" / "0.tar", [("a.jpg", b"image"), ("a.txt", b"a dog"), ("b.jpg", b"image")])
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "key=7" / "catalog").catalog
    assert [row["key"] for row in catalog.rejected().to_pylist()] == ["b"]


def test_create_in_an_empty_folder(tmp_path):
    assert Catalog.create(tmp_path).shards().num_rows == 0


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_create_never_writes_among_other_files(tmp_path, tree_bytes, kind):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("…")
    before = tree_bytes(tmp_path)
    with pytest.raises(UserError, match="exists and is no catalog"):
        Catalog.create(tmp_path / "thesis" if kind == "folder" else tmp_path / "thesis" / "chapter")
    assert tree_bytes(tmp_path) == before


def test_relative_and_home_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Catalog.create("here").folder == tmp_path / "here"
    assert Catalog.open("~/here").folder == tmp_path / "here"


# --- snapshots and parts ------------------------------------------------------------------------------------------------


def test_a_catalog_without_samples(tmp_path):
    with pytest.raises(UserError, match=r"holds no samples.*tailwise import"):
        Catalog.create(tmp_path).snapshot()


def test_unknown_snapshot(small_catalog):
    assert small_catalog.snapshot(1) == small_catalog.snapshot()
    for number in (0, 2, -1):
        with pytest.raises(UserError, match=rf"snapshot {number} is not among 1 … 1"):
            small_catalog.snapshot(number)


def test_parts_cover_the_rows(small_catalog):
    snapshot = small_catalog.snapshot()
    assert (snapshot.number, snapshot.shards, snapshot.parts, snapshot.rows) == (1, 3, 2, 600)
    parts = small_catalog.parts()
    assert [(part.number, part.first_row, part.rows, part.name) for part in parts] == [
        (0, 0, 460, "part-000000"),
        (1, 460, 140, "part-000001"),
    ]
    assert [part.span for part in parts] == [slice(0, 460), slice(460, 600)]
    keys = [key for part in parts for key in small_catalog.samples(part, ["key"]).column(0).to_pylist()]
    assert keys == [f"{row:06d}" for row in range(600)]
    shards = [shard for part in parts for shard in small_catalog.samples(part, ["shard"]).column(0).to_pylist()]
    assert shards == [0] * 260 + [1] * 200 + [2] * 140


def test_the_small_catalog_is_what_it_says(small_catalog, small_groups):
    rows = np.concatenate(small_catalog.embedding_parts("image", small_catalog.snapshot())).astype(np.float32)
    assert rows.shape == (600, 16)
    cosine = rows @ rows.T
    same = small_groups[:, None] == small_groups[None, :]
    assert cosine[same].min() > 0.7
    assert cosine[~same].max() < 0.6
    assert np.bincount(small_groups).tolist() == sorted(np.bincount(small_groups).tolist(), reverse=True)
    assert small_catalog.rejected() is None


def test_snapshot_id_is_of_the_shards_contents_alone(tmp_path, make_tar):
    def imported(folder, caption):
        make_tar(tmp_path / folder / "pool" / "0.tar", [("a.jpg", b"image"), ("a.txt", caption)])
        return import_pool([str(tmp_path / folder / "pool")], tmp_path / folder / "catalog", workers=1).snapshot.id

    assert imported("x", b"caption") == imported("y", b"caption") == "0aa7c8675e8bfe65010665aef7fb37b0"
    assert imported("z", b"longer caption") != imported("x", b"caption")


def test_missing_embeddings_name_the_remedy(small_catalog):
    with pytest.raises(
        UserError,
        match=r"600 of 600 samples have no text embeddings.*or make them \(`tailwise embed .*--column text`\)$",
    ):
        small_catalog.embedding_parts("text", small_catalog.snapshot())
    (small_catalog.embedding_folder("image") / "part-000001.json").unlink()
    with pytest.raises(UserError, match=r"140 of 600 samples have no image embeddings.*or make them \(`tailwise embed"):
        small_catalog.embedding_parts("image", small_catalog.snapshot())


def test_embedding_id_is_of_the_rows(small_catalog):
    first = small_catalog.embedding_id("image", small_catalog.snapshot())
    assert first == small_catalog.embedding_id("image", small_catalog.snapshot())
    marker = small_catalog.embedding_folder("image") / "part-000001.json"
    write_record(marker, {**read_record(marker), "digest": "0" * 32})
    assert small_catalog.embedding_id("image", small_catalog.snapshot()) != first


# --- paths --------------------------------------------------------------------------------------------------------------


def test_relocate_changes_paths_and_nothing_else(small_catalog, tree_bytes):
    before = tree_bytes(small_catalog.folder)
    snapshot, shards = small_catalog.snapshot(), small_catalog.shards()
    old = shards.column("path").to_pylist()[0].removesuffix("/00000.tar")
    assert small_catalog.relocate(old, "s3://bucket/pool") == 3
    moved = small_catalog.shards()
    assert moved.column("path").to_pylist() == [f"s3://bucket/pool/{shard:05d}.tar" for shard in range(3)]
    assert moved.drop(["path"]).equals(shards.drop(["path"]))
    assert moved.schema.equals(shards.schema)
    assert small_catalog.snapshot() == snapshot
    after = tree_bytes(small_catalog.folder)
    assert {name for name in after if after[name] != before.get(name)} == {"shards.parquet"}
    assert set(after) == set(before)


def test_relocate_part_of_the_shards_and_back(small_catalog, tree_bytes):
    before = tree_bytes(small_catalog.folder)
    path = small_catalog.shards().column("path").to_pylist()[1]
    assert small_catalog.relocate(path, "/elsewhere/1.tar") == 1
    assert small_catalog.relocate("/elsewhere/1.tar", path) == 1
    assert tree_bytes(small_catalog.folder) == before


def test_relocate_again_changes_nothing(small_catalog, tree_bytes):
    old = str(Path(small_catalog.shards().column("path").to_pylist()[0]).parent)
    assert small_catalog.relocate(old, "/elsewhere") == 3
    before = tree_bytes(small_catalog.folder)
    assert small_catalog.relocate(old, "/elsewhere/") == 0
    assert tree_bytes(small_catalog.folder) == before


def test_relocate_of_a_prefix_that_is_not_there(small_catalog, tree_bytes):
    before = tree_bytes(small_catalog.folder)
    with pytest.raises(UserError, match=r"no shard's path begins with '/nowhere' \(the first is '.*00000.tar'\)"):
        small_catalog.relocate("/nowhere", "/x")
    assert tree_bytes(small_catalog.folder) == before


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "k500-merge0.7", "A_b", "0", "größe", "x..y"])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "a\n", "a\\b", "a:b", "*", "a\0"])
def test_bad_names(name):
    with pytest.raises(UserError, match="can't name an artifact"):
        check_name(name)


def test_relocate_knows_where_a_folders_name_ends(tmp_path, make_pool):
    from tailwise.steps.importing.pool import import_pool

    make_pool(tmp_path / "pool", [2])
    make_pool(tmp_path / "pool2", [2], first_shard=5)
    catalog = import_pool([tmp_path / "pool", tmp_path / "pool2"], tmp_path / "catalog", workers=1).catalog
    assert catalog.relocate(f"{tmp_path}/pool/", "/mnt/a") == 1
    assert catalog.shards()["path"].to_pylist() == ["/mnt/a/00000.tar", f"{tmp_path}/pool2/00005.tar"]


@pytest.mark.parametrize("rows", [[0, 39], [64, 40, 40], [10], [], range(98), [97, 0, 50]])
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_samples_are_read_from_their_row_groups(tmp_path, watched, rows, size):
    catalog = Catalog.create(tmp_path / "catalog")
    catalog.samples_path(0).parent.mkdir()
    keys = [f"key {row}" for row in range(98)]
    pq.write_table(pa.table({"key": keys, "caption": keys}), catalog.samples_path(0), row_group_size=size)
    with watched(pq.ParquetFile, "read_row_groups") as calls:
        found = catalog.samples_at(0, np.array(rows, np.int64), ["key"])
    assert found.to_pydict() == {"key": [keys[row] for row in rows]}
    assert [group for _, groups in calls for group in groups] == sorted({row // size for row in rows})
    with pytest.raises(UserError, match="missing or damaged"):
        catalog.samples_at(0, np.array([98]), ["key"])


@pytest.mark.parametrize("noted", [True, False])
def test_a_path_that_is_no_longer_text_is_damage(small_catalog, noted):
    """As a flipped bit makes it, with the noted hash of the table or without."""
    path = small_catalog.folder / "shards.parquet"
    table = pq.read_table(path)
    paths = [item.encode() for item in table.column("path").to_pylist()]
    paths[1] = b"\xff" + paths[1][1:]
    unchecked = pa.array(paths, pa.binary()).buffers()
    column = pa.Array.from_buffers(pa.string(), len(paths), unchecked)
    at = table.schema.get_field_index("path")
    metadata = table.schema.metadata if noted else None
    pq.write_table(table.set_column(at, table.schema.field(at), column).replace_schema_metadata(metadata), path)
    with pytest.raises(UserError, match=r"shards.parquet is damaged \(its checksum is wrong\)"):
        Catalog.open(small_catalog.folder).shards()
