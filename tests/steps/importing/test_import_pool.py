"""Importing a pool end to end: what is good arrives, what is not is counted by reason and listed."""

import itertools
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.shards.content import hashed_uid
from tailwise.steps.importing.pool import import_pool

UID = "00112233445566778899aabbccddeeff"
STAGE = "image embeddings"


@pytest.fixture
def pool(tmp_path, make_pool):
    """Two tars of four samples in `tmp_path / "pool"`; {path: keys}."""
    return make_pool(tmp_path / "pool", [4, 4])


@pytest.fixture
def keys(pool):
    return list(itertools.chain(*pool.values()))


def column(catalog, name):
    return list(itertools.chain(*(catalog.samples(part, [name]).column(0).to_pylist() for part in catalog.parts())))


def embeddings(catalog, name="image"):
    return np.concatenate(catalog.embedding_parts(name, catalog.snapshot())).astype(np.float64)


def check_embeddings(catalog, vectors, name="image"):
    """Every sample has the unit vector of its key, those without a vector have zeros."""
    rows = embeddings(catalog, name)
    for key, row in zip(column(catalog, "key"), rows, strict=True):
        if key in vectors:
            vector = np.asarray(vectors[key], np.float64)
            np.testing.assert_allclose(row, vector / np.linalg.norm(vector), atol=2e-3)
            assert abs(np.linalg.norm(row) - 1) < 2e-3
        else:
            assert not row.any(), key


def listed(catalog, reason):
    return [row for row in catalog.rejected().to_pylist() if row["reason"] == reason]


def fail(run, *sources, **options):
    with pytest.raises(UserError) as caught:
        run(*sources, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_that_are_cut_while_they_are_read_are_one_line(
    run, tmp_path, pool, keys, make_vectors, make_embeddings, make_metadata, packed
):
    vectors = make_vectors(keys)
    if packed:  # DataComp's layout, joined by uid
        uids = [f"{number:032x}" for number in range(4)]
        array = np.ones((4, 8), np.float16)
        sources = [make_metadata(tmp_path / "metadata", "a", uids, {"l14_img": array, "l14_txt": array})]
        path = tmp_path / "metadata" / "a.npz"
    else:
        sources = [tmp_path / "pool", make_embeddings(tmp_path / "embeddings", vectors)]
        path = tmp_path / "embeddings" / "img_emb" / "img_emb_0.npy"
    whole = path.read_bytes()

    def cut(items, description, _=None):
        if description == "image embeddings":  # they were planned, and are read now
            path.write_bytes(whole[:-6])
        return items

    assert f"{path.name} changed while it was read" in fail(run, *sources, context=Context(cut))
    path.write_bytes(whole)
    found = embeddings(run(*sources).catalog)
    assert found.any(axis=1).all()


# --- what is good -------------------------------------------------------------------------------------------------------


def test_tars_alone(run, pool, keys, tmp_path):
    report = run(tmp_path / "pool")
    catalog = report.catalog
    assert (report.snapshot.number, report.snapshot.shards, report.snapshot.rows) == (1, 2, 8)
    assert (report.new_shards, report.new_samples, report.columns) == (2, 8, [])
    assert column(catalog, "key") == keys
    assert column(catalog, "caption") == [f"caption of {key}" for key in keys]
    assert column(catalog, "uid") == [hashed_uid(row // 4, key) for row, key in enumerate(keys)]
    shards = catalog.shards().to_pylist()
    assert [(row["shard"], row["path"], row["rows"]) for row in shards] == [(0, *first(pool, 0)), (1, *first(pool, 1))]
    assert catalog.rejected() is None
    assert not report.rejections.counts


def first(pool, position):
    path, keys = list(pool.items())[position]
    return str(path), len(keys)


def test_members_point_at_their_bytes(run, tmp_path, pool):
    catalog = run(tmp_path / "pool").catalog
    paths = catalog.shards().column("path").to_pylist()
    for row in catalog.samples(catalog.parts()[0]).to_pylist():
        with tarfile.open(paths[row["shard"]]) as tar, open(paths[row["shard"]], "rb") as stream:  # noqa: PTH123
            for part, extension in (("image", row["image_extension"]), ("caption", "txt")):
                stream.seek(row[f"{part}_offset"])
                member = tar.getmember(f"{row['key']}.{extension}")
                assert stream.read(row[f"{part}_bytes"]) == tar.extractfile(member).read()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("partitions", [1, 3])
def test_embeddings_are_matched_by_key(run, tmp_path, keys, make_vectors, make_embeddings, dtype, partitions):
    vectors = make_vectors(keys[::-1])
    make_embeddings(tmp_path / "embeddings", vectors, partitions, dtype)
    report = run(tmp_path / "pool", tmp_path / "embeddings")
    check_embeddings(report.catalog, vectors)
    assert embeddings(report.catalog).shape == (8, 8)
    (made,) = report.columns
    assert (made.column, made.dimension, made.embedded, made.samples) == ("image", 8, 8, 8)
    assert report.catalog.rejected() is None


def test_image_and_text_embeddings(run, tmp_path, keys, make_vectors, make_embeddings):
    image, text = make_vectors(keys), make_vectors(keys, dimension=5, seed=1)
    make_embeddings(tmp_path / "embeddings", image, 2)
    make_embeddings(tmp_path / "embeddings", text, 2, "float32", column="text")
    report = run(tmp_path / "pool", tmp_path / "embeddings")
    check_embeddings(report.catalog, image, "image")
    check_embeddings(report.catalog, text, "text")
    assert [(made.column, made.dimension) for made in report.columns] == [("image", 8), ("text", 5)]


def test_embeddings_are_unit_float16_whatever_their_length(run, tmp_path, keys, make_vectors, make_embeddings):
    lengths = [1e-20, 1e-6, 0.01, 1, 3, 1e4, 1e10, 1e18]
    vectors = {key: length * vector for length, (key, vector) in zip(lengths, make_vectors(keys).items(), strict=True)}
    make_embeddings(tmp_path / "embeddings", vectors, dtype="float32")
    catalog = run(tmp_path / "pool", tmp_path / "embeddings").catalog
    check_embeddings(catalog, vectors)
    assert catalog.embedding("image", catalog.parts()[0]).dtype == np.float16


def test_parts_close_with_the_shard_that_fills_them(run, tmp_path, make_pool, make_vectors, make_embeddings):
    sizes = [3, 2, 5, 1, 1, 1, 4]
    keys = list(itertools.chain(*make_pool(tmp_path / "many", sizes).values()))
    vectors = make_vectors(keys)
    make_embeddings(tmp_path / "many", vectors, 4)
    catalog = run(tmp_path / "many", part_rows=5).catalog
    assert [part.rows for part in catalog.parts()] == [5, 5, 7]
    assert catalog.shards().column("part").to_pylist() == [0, 0, 1, 2, 2, 2, 2]
    assert column(catalog, "key") == keys
    check_embeddings(catalog, vectors)


def test_remote_tars(run, make_tar_bytes, tmp_path, make_vectors, make_embeddings):
    for shard in "01":
        with fsspec.open(f"memory://import/{shard}.tar", "wb") as stream:
            stream.write(make_tar_bytes([(f"{shard}a.jpg", b"image"), (f"{shard}a.txt", b"caption")]))
    vectors = make_vectors(["0a", "1a"])
    report = run("memory://import/{0..1}.tar", make_embeddings(tmp_path / "embeddings", vectors))
    assert report.snapshot.rows == 2
    assert all(path.startswith("memory://") for path in report.catalog.shards().column("path").to_pylist())
    check_embeddings(report.catalog, vectors)
    assert run("memory://import").new_shards == 0


def test_scores_sizes_and_uids_of_sidecars(run, tmp_path, pool):
    import pyarrow as pa

    (path, mine), _ = pool.items()
    sidecar = {"key": mine, "status": ["success"] * 4, "width": [1, 2, 3, 4], "score": [0.5, None, 1.5, 2.5]}
    pq.write_table(pa.table({**sidecar, "uid": [UID, None, None, None]}), path.with_suffix(".parquet"))
    catalog = run(tmp_path / "pool").catalog
    assert column(catalog, "score") == [0.5, None, 1.5, 2.5, None, None, None, None]
    assert column(catalog, "width") == [1, 2, 3, 4, None, None, None, None]
    assert column(catalog, "uid") == [bytes.fromhex(UID), *(hashed_uid(0, key) for key in mine[1:])] + [
        hashed_uid(1, key) for key in column(catalog, "key")[4:]
    ]


def test_partitions_from_ten_on_are_read_in_numeric_order(run, tmp_path, keys, make_vectors, make_partition):
    """The first embedding of a key is kept: that of partition 2, not of partition 10, which sorts before it as text."""
    vectors = make_vectors(keys)
    others = make_vectors(keys, seed=9)
    for number, (key, vector) in enumerate(vectors.items(), 2):
        make_partition(tmp_path / "embeddings", number, [key], [vector])
    for number, key in enumerate(keys[:3], 10):
        make_partition(tmp_path / "embeddings", number, [key], [others[key]])
    make_partition(tmp_path / "embeddings", 100, [keys[4]], [others[keys[4]]])
    catalog = run(tmp_path / "pool", tmp_path / "embeddings").catalog
    check_embeddings(catalog, vectors)
    assert [row["key"] for row in listed(catalog, "duplicate embedding")] == [*keys[:3], keys[4]]


# --- faults of tars -----------------------------------------------------------------------------------------------------


def test_truncated_tar(run, tmp_path, pool, keys, rejected_counts):
    path = list(pool)[1]
    with tarfile.open(path) as tar:
        third = tar.getmember(f"{keys[6]}.jpg")
    path.write_bytes(path.read_bytes()[: third.offset_data + 10])
    catalog = run(tmp_path / "pool").catalog
    assert column(catalog, "key") == keys[:6]
    assert rejected_counts(catalog) == {("import", "truncated or damaged tar"): 1}
    (row,) = catalog.rejected().to_pylist()
    assert (row["file"], row["key"], row["rows"]) == (str(path), keys[6], 1)


def test_faults_within_a_tar(run, tmp_path, make_tar, rejected_counts):
    good = [("good.jpg", b"image"), ("good.txt", b"caption")]
    members = [
        ("lonely.jpg", b"image"),
        ("mute.txt", b"caption"),
        *good,
        ("latin.jpg", b"image"),
        ("latin.txt", b"caf\xe9"),
        ("bytes\udcff.jpg", b"image"),
        ("bytes\udcff.txt", b"caption"),
        ("good.jpg", b"another"),
        ("good.txt", b"another"),
        ("data.json", b"{}"),
    ]
    path = make_tar(tmp_path / "pool" / "0.tar", members)
    report = run(tmp_path / "pool")
    assert column(report.catalog, "key") == ["good"]
    assert column(report.catalog, "caption") == ["caption"]
    expected = {
        "image without caption": ("lonely", 1),
        "caption without image": ("mute", 1),
        "caption is not UTF-8": ("latin", 1),
        "key is not UTF-8": ("'bytes\\udcff'", 1),
        "duplicate key": ("good", 1),
        "neither image nor caption": ("data", 1),
    }
    assert {row["reason"]: (row["key"], row["rows"]) for row in report.catalog.rejected().to_pylist()} == expected
    assert {row["file"] for row in report.catalog.rejected().to_pylist()} == {str(path)}
    assert rejected_counts(report.catalog) == dict(report.rejections.counts)


def test_bad_tars_among_good_ones(run, tmp_path, pool, keys, rejected_counts):
    (tmp_path / "pool" / "00000a.tar").write_bytes(b"<html>not found</html>")
    (tmp_path / "pool" / "00002.tar").touch()
    report = run(tmp_path / "pool")
    assert column(report.catalog, "key") == keys
    assert report.new_shards == 2
    assert report.catalog.shards().column("shard").to_pylist() == [0, 1]
    assert rejected_counts(report.catalog) == {("import", "not a tar"): 1, ("import", "tar without an end"): 1}


# --- faults of embeddings -----------------------------------------------------------------------------------------------


def test_embedding_without_sample_and_sample_without_embedding(
    run, tmp_path, pool, keys, make_vectors, make_embeddings, rejected_counts
):
    vectors = make_vectors([*keys[:3], "stranger", *keys[4:]])
    make_embeddings(tmp_path / "embeddings", vectors, 2)
    report = run(tmp_path / "pool", tmp_path / "embeddings")
    check_embeddings(report.catalog, vectors)
    assert rejected_counts(report.catalog) == {
        (STAGE, "embedding without sample"): 1,
        (STAGE, "sample without embedding"): 1,
    }
    assert rejected_counts(report.catalog) == dict(report.rejections.counts)
    (stranger,) = listed(report.catalog, "embedding without sample")
    assert stranger["key"] == "stranger"
    assert stranger["file"].endswith("img_emb_1.npy")
    (lacking,) = listed(report.catalog, "sample without embedding")
    assert (lacking["key"], lacking["file"]) == (keys[3], str(next(iter(pool))))
    assert (report.columns[0].embedded, report.columns[0].samples) == (7, 8)


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (np.nan, "float16", "NaN or Inf"),
        (np.inf, "float32", "NaN or Inf"),
        (-np.inf, "float16", "NaN or Inf"),
        (1e300, "float64", "NaN or Inf"),
        (0.0, "float16", "zero norm"),
        (-0.0, "float32", "zero norm"),
    ],
)
def test_rows_that_can_not_be_scaled(
    run, tmp_path, keys, make_vectors, make_embeddings, rejected_counts, value, dtype, reason
):
    vectors = make_vectors(keys)
    if value:
        vectors[keys[5]] = vectors[keys[5]].astype(np.float64)
        vectors[keys[5]][3] = value
    else:
        vectors[keys[5]] = np.full(8, value)
    make_embeddings(tmp_path / "embeddings", vectors, 2, dtype)
    catalog = run(tmp_path / "pool", tmp_path / "embeddings").catalog
    del vectors[keys[5]]
    check_embeddings(catalog, vectors)
    assert rejected_counts(catalog) == {(STAGE, reason): 1}
    assert catalog.rejected().column("key").to_pylist() == [keys[5]]


@pytest.mark.parametrize(
    "fault", ["wrong dimension", "rows differ from metadata", "unreadable metadata", "unreadable embeddings"]
)
def test_whole_partitions_that_can_not_be_used(
    run, tmp_path, keys, make_vectors, make_embeddings, make_partition, rejected_counts, fault
):
    vectors = make_vectors(keys)
    folder = make_embeddings(tmp_path / "embeddings", vectors, 3)
    bad = keys[1::3]
    rows = np.ones((len(bad), 5 if fault == "wrong dimension" else 8), np.float16)
    make_partition(folder, 1, bad, rows[: 1 if fault == "rows differ from metadata" else None])
    if fault == "unreadable metadata":
        (folder / "metadata" / "metadata_1.parquet").unlink()
    if fault == "unreadable embeddings":
        (folder / "img_emb" / "img_emb_1.npy").write_bytes(b"junk")
    catalog = run(tmp_path / "pool", folder).catalog
    check_embeddings(catalog, {key: vector for key, vector in vectors.items() if key not in bad})
    (row,) = listed(catalog, fault)
    assert row["key"] is None
    assert row["file"].endswith("img_emb_1.npy")
    lost = {"rows differ from metadata": 1}.get(fault, len(bad))
    assert rejected_counts(catalog) == {(STAGE, fault): lost, (STAGE, "sample without embedding"): len(bad)}


def test_one_partition_of_another_width_does_not_decide(
    run, tmp_path, keys, make_vectors, make_embeddings, make_partition
):
    vectors = make_vectors(keys)
    folder = make_embeddings(tmp_path / "embeddings", vectors, 4)
    make_partition(folder, 0, keys[::4], np.ones((2, 5), np.float16))
    catalog = run(tmp_path / "pool", folder).catalog
    check_embeddings(catalog, {key: vector for key, vector in vectors.items() if key not in keys[::4]})
    assert len(listed(catalog, "wrong dimension")) == 1


def test_key_of_several_tars_is_ambiguous(run, tmp_path, make_pool, make_vectors, make_embeddings, rejected_counts):
    """Neither sample gets an embedding, since nobody knows whose it is; keys that are one tar's alone are matched."""
    make_pool(tmp_path / "pool" / "a", [2, 2])
    make_pool(tmp_path / "pool" / "b", [2])
    vectors = make_vectors(["000000000", "000000001", "000010000", "000010001"])
    make_embeddings(tmp_path / "embeddings", vectors, 2)
    catalog = run(tmp_path / "pool", tmp_path / "embeddings", part_rows=4).catalog
    check_embeddings(catalog, {key: vectors[key] for key in ("000010000", "000010001")})
    assert rejected_counts(catalog) == {(STAGE, "ambiguous key"): 2, (STAGE, "sample without embedding"): 4}


def test_duplicate_embeddings_keep_the_first(run, tmp_path, keys, make_vectors, make_partition, rejected_counts):
    vectors, others = make_vectors(keys), make_vectors(keys, seed=3)
    folder = tmp_path / "embeddings"
    once = [*keys[:5], keys[2], keys[2]]
    make_partition(folder, 0, once, [*(vectors[key] for key in keys[:5]), others[keys[2]], others[keys[2]]])
    make_partition(folder, 1, [keys[0], *keys[5:]], [others[keys[0]], *(vectors[key] for key in keys[5:])])
    catalog = run(tmp_path / "pool", folder).catalog
    check_embeddings(catalog, vectors)
    assert rejected_counts(catalog) == {(STAGE, "duplicate embedding"): 3}
    assert [row["key"] for row in listed(catalog, "duplicate embedding")] == [keys[2], keys[2], keys[0]]


def test_all_faults_at_once(run, tmp_path, make_tar, make_pool, make_vectors, make_partition, rejected_counts):
    """Every fault in one pool of several parts: each is counted once, and no good sample is lost to another's fault."""
    pool = make_pool(tmp_path / "pool", [5, 5, 5, 5])
    keys = list(itertools.chain(*pool.values()))
    odd = [
        ("x.jpg", b"image"),
        ("y.txt", b"caption"),
        ("z.jpg", b"i"),
        ("z.txt", b"c"),
        ("z.jpg", b"i"),
        ("z.txt", b"c"),
    ]
    make_tar(tmp_path / "pool" / "00001b.tar", odd)
    last = list(pool)[3]
    with tarfile.open(last) as tar:
        last.write_bytes(last.read_bytes()[: tar.getmember(f"{keys[19]}.txt").offset_data + 1])
    vectors = make_vectors([*keys, "z"])
    folder = tmp_path / "embeddings"
    mixed = np.random.default_rng(0).permutation([key for key in vectors if key != keys[3]]).tolist()
    for number in range(12):
        mine = mixed[number::12]
        rows = np.stack([vectors[key] for key in mine]).astype(np.float32)
        if number == 4:
            rows[0] = 0
        if number == 10:
            rows[0, 2] = np.nan
        make_partition(folder, number, mine, rows)
    (folder / "metadata" / "metadata_7.parquet").unlink()
    make_partition(folder, 12, ["stranger", mixed[0]], np.ones((2, 8), np.float32))
    make_partition(folder, 13, ["stranger"], np.ones((1, 9), np.float32))
    report = run(tmp_path / "pool", folder, part_rows=8)
    catalog = report.catalog
    assert column(catalog, "key") == [*keys[:10], "z", *keys[10:19]]
    lost = {keys[3], mixed[4], mixed[10], *mixed[7::12]} - {keys[19]}
    check_embeddings(catalog, {key: vector for key, vector in vectors.items() if key not in lost})
    strangers = 1 + (keys[19] not in mixed[7::12])  # the truncated sample's own embedding
    assert rejected_counts(catalog) == {
        ("import", "image without caption"): 1,
        ("import", "caption without image"): 1,
        ("import", "duplicate key"): 1,
        ("import", "truncated or damaged tar"): 1,
        (STAGE, "zero norm"): 1,
        (STAGE, "NaN or Inf"): 1,
        (STAGE, "unreadable metadata"): len(mixed[7::12]),
        (STAGE, "wrong dimension"): 1,
        (STAGE, "embedding without sample"): strangers,
        (STAGE, "duplicate embedding"): 1,
        (STAGE, "sample without embedding"): len(lost) - 2,
    }
    assert rejected_counts(catalog) == dict(report.rejections.counts)
    listings = [name.as_posix() for name in report.rejections.files]
    assert sorted(listings) == sorted(path.as_posix() for path in (catalog.folder / "rejected").iterdir())


# --- nothing good at all ------------------------------------------------------------------------------------------------


def test_nothing_good_in_the_tars(run, tmp_path, make_tar):
    make_tar(tmp_path / "pool" / "0.tar", [("a.jpg", b"image")])
    make_tar(tmp_path / "pool" / "1.tar", [("b.txt", b"caption")])
    message = fail(run, tmp_path / "pool")
    assert "image without caption: 1" in message
    assert "caption without image: 1" in message
    assert "0.tar" in message


def test_empty_tars_only(run, tmp_path, make_tar):
    make_tar(tmp_path / "pool" / "0.tar", [])
    assert "no sample with image and caption" in fail(run, tmp_path / "pool")


def test_embeddings_before_any_tar(run, tmp_path, make_vectors, make_embeddings):
    assert "holds no samples yet" in fail(run, make_embeddings(tmp_path / "embeddings", make_vectors(["a"])))


def test_no_embedding_belongs_to_a_sample(run, tmp_path, keys, make_vectors, make_embeddings):
    make_embeddings(tmp_path / "embeddings", make_vectors([f"{key}.jpg" for key in keys]))
    message = fail(run, tmp_path / "pool", tmp_path / "embeddings")
    assert f"{keys[0]}.jpg" in message  # both keys are shown, so that the difference can be seen
    assert repr(keys[0]) in message
    catalog = run(tmp_path / "pool").catalog
    assert not list(catalog.embedding_folder("image").glob("*.npy"))


def test_no_partition_can_be_read(run, tmp_path, pool, make_embeddings, make_vectors, keys):
    folder = make_embeddings(tmp_path / "embeddings", make_vectors(keys))
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(b"")
    assert "unreadable embeddings" in fail(run, tmp_path / "pool", folder)


def test_nothing_to_import_makes_no_catalog(run, tmp_path):
    assert "does not exist" in fail(run, tmp_path / "absent")
    assert not (tmp_path / "catalog").exists()


def test_nothing_of_the_users_is_touched(run, tmp_path, pool, make_vectors, make_embeddings, keys, tree_bytes):
    make_embeddings(tmp_path / "pool", make_vectors([*keys[1:], "stranger"]))
    before = tree_bytes(tmp_path / "pool")
    run(tmp_path / "pool")
    assert tree_bytes(tmp_path / "pool") == before


def test_a_folder_with_other_files_is_no_place_for_a_catalog(run, tmp_path, pool):
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "thesis").touch()
    assert "is no catalog" in fail(run, tmp_path / "pool")


# --- real data ----------------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_tinyimagenet_lt(shared_data, tmp_path):
    source = shared_data / "tinyimagenet-lt"
    report = import_pool([str(source / "train"), str(source / "embeddings")], tmp_path / "catalog")
    catalog = report.catalog
    assert (report.snapshot.shards, report.snapshot.rows) == (10, 23_795)
    assert catalog.rejected() is None
    (made,) = report.columns
    assert (made.dimension, made.embedded) == (384, 23_795)
    sizes = json.loads((source / "train" / "sizes.json").read_text())
    shards = catalog.shards().to_pylist()
    assert {row["path"].rsplit("/", 1)[1]: row["rows"] for row in shards} == sizes
    rows = np.concatenate(catalog.embedding_parts("image", report.snapshot))
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)
    imported = dict(zip(column(catalog, "key"), rows, strict=True))
    for array in (source / "embeddings" / "img_emb").glob("*.npy"):
        number = array.stem.removeprefix("img_emb_")
        keys = pq.read_table(source / "embeddings" / "metadata" / f"metadata_{number}.parquet").column("image_path")
        theirs = np.load(array)
        ours = np.stack([imported[key] for key in keys.to_pylist()])
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=2e-3)


# --- how much may be left out -------------------------------------------------------------------------------------------


def test_many_rows_of_another_width_are_an_error(run, tmp_path, keys, make_vectors, make_embeddings, make_partition):
    vectors = make_vectors(keys)
    folder = make_embeddings(tmp_path / "embeddings", vectors, 4)
    make_partition(folder, 2, keys[2::4], np.ones((2, 5), np.float16))
    for _ in range(2):  # it says so each time
        message = fail(run, tmp_path / "pool", folder, max_rejected=None)
        assert "2 of 8 rows of image embeddings (25.0%) can't be used, more than `max_rejected` 0.1" in message
        assert "8 numbers a row in 3 files, 5 numbers a row in 1 files" in message
        assert not list((tmp_path / "catalog" / "embeddings").rglob("part-*"))
    catalog = run(tmp_path / "pool", folder, max_rejected=0.25).catalog
    check_embeddings(catalog, {key: vector for key, vector in vectors.items() if key not in keys[2::4]})


@pytest.mark.parametrize("width", [65_537, 1_000_000])
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_an_array_of_too_many_numbers_a_row_is_no_embedding(run, tmp_path, pool, keys, make_partition, width, kind):
    """Every sample would take as many; the other embeddings are imported."""
    folder = tmp_path / "embeddings"
    if kind == "npy":
        make_partition(folder, 0, keys[:1], np.ones((1, width), np.float16))
    else:
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(width, np.float32)), width)
        folder.mkdir()
        pq.write_table(pa.table({"key": keys[:1], "embedding": values}), folder / "0.parquet")
    if kind == "npy":
        make_partition(folder, 1, keys[1:], np.eye(7, 8, dtype=np.float16))
    else:
        rows = [row.tolist() for row in np.eye(7, 8, dtype=np.float32)]
        pq.write_table(pa.table({"key": keys[1:], "embedding": rows}), folder / "1.parquet")
    catalog = run(tmp_path / "pool", folder).catalog
    (row,) = listed(catalog, "not an embedding matrix" if kind == "npy" else "unreadable embeddings")
    assert row["detail"].endswith(f"[1, {width}]: more than 65,536 numbers a row")
    assert row["rows"] == 1
    assert embeddings(catalog).shape == (8, 8)
    assert not embeddings(catalog)[0].any()
    assert np.array_equal(embeddings(catalog)[1:], np.eye(7, 8))


def test_many_bad_rows_are_an_error_until_they_are_allowed(run, tmp_path, keys, make_vectors, make_embeddings):
    vectors = make_vectors(keys)
    vectors[keys[5]] = np.full(8, np.nan)
    make_embeddings(tmp_path / "embeddings", vectors)
    for _ in range(2):
        assert "1 of 8 rows" in fail(run, tmp_path / "pool", tmp_path / "embeddings", max_rejected=None)
    catalog = run(tmp_path / "pool", tmp_path / "embeddings", max_rejected=0.2).catalog
    del vectors[keys[5]]
    check_embeddings(catalog, vectors)
    assert not (catalog.embedding_folder("image") / "pending.json").exists()


def test_many_samples_left_out_are_an_error(run, tmp_path, pool, make_tar):
    make_tar(tmp_path / "pool" / "00009.tar", [(f"{number}.txt", b"x") for number in range(9)])
    message = fail(run, tmp_path / "pool", max_rejected=None)
    assert "9 of 17 samples (52.9%) of new files are left out, more than `max_rejected` 0.5" in message
    assert run(tmp_path / "pool", max_rejected=0.6).snapshot.rows == 8
    make_tar(tmp_path / "pool" / "00010.tar", [("x.txt", b"x")])
    assert "1 of 1 samples" in fail(run, tmp_path / "pool", max_rejected=None)
    assert "must lie between 0 and 1" in fail(run, tmp_path / "pool", max_rejected=2)


def test_embeddings_of_dotted_names_by_path(tmp_path, make_tar, make_partition):
    names = ["photo.0001", "photo.0002", "a"]
    members = [item for name in names for item in ((f"{name}.jpg", b"i"), (f"{name}.txt", b"c"))]
    make_tar(tmp_path / "pool" / "0.tar", [*members, ("a.seg.png", b"s")])
    paths = [*(f"/old/pool/0.tar/{name}.jpg" for name in names[:2]), "/old/pool/0.tar/a.seg.png"]
    make_partition(tmp_path / "pool" / "embeddings", 0, paths, np.eye(3, 4, dtype=np.float32))
    report = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1)
    assert [made.embedded for made in report.columns] == [3]
    assert not report.rejections.counts
