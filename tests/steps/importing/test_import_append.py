"""Importing into a catalog that holds samples already: snapshots, no-ops, refusals."""

import itertools

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.requests import EmbedRequest

PART_ROWS = 4


@pytest.fixture
def old(tmp_path, make_pool):
    """Keys of two tars (3 and 2 samples: one part) in `tmp_path / "old"`."""
    return list(itertools.chain(*make_pool(tmp_path / "old", [3, 2]).values()))


@pytest.fixture
def new(tmp_path, make_pool):
    """Keys of three tars (4, 1 and 1 samples: two parts) in `tmp_path / "new"`."""
    return list(itertools.chain(*make_pool(tmp_path / "new", [4, 1, 1], first_shard=7).values()))


def column(catalog, name, snapshot=None):
    parts = catalog.parts(snapshot)
    return list(itertools.chain(*(catalog.samples(part, [name]).column(0).to_pylist() for part in parts)))


def embeddings(catalog, snapshot=None):
    return np.concatenate(catalog.embedding_parts("image", snapshot or catalog.snapshot())).astype(np.float64)


def check_embeddings(catalog, vectors, snapshot=None):
    expected = np.stack([vectors[key] / np.linalg.norm(vectors[key]) for key in column(catalog, "key", snapshot)])
    np.testing.assert_allclose(embeddings(catalog, snapshot), expected, atol=2e-3)


def stamps(folder):
    """When each file below a folder was written, and which file it is."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def test_appending_makes_a_snapshot_and_leaves_the_first_as_it_was(
    run, tmp_path, old, new, make_vectors, make_embeddings, tree_bytes
):
    vectors = make_vectors([*old, *new])
    make_embeddings(tmp_path / "old", {key: vectors[key] for key in old}, 2)
    make_embeddings(tmp_path / "new", {key: vectors[key] for key in new}, 2)
    catalog = run(tmp_path / "old").catalog
    first, rows, shards = catalog.snapshot(), embeddings(catalog), catalog.shards()
    bytes_before, stamps_before = tree_bytes(catalog.folder), stamps(catalog.folder)

    report = run(tmp_path / "new")

    second = report.snapshot
    assert (second.number, second.shards, second.parts, second.rows) == (2, 5, 3, 11)
    assert (report.new_shards, report.new_samples) == (3, 6)
    assert second.id != first.id
    assert catalog.snapshot(1) == first
    assert catalog.shards(first).equals(shards)
    assert catalog.shards().column("shard").to_pylist() == [0, 1, 2, 3, 4]
    assert catalog.shards().column("part").to_pylist() == [0, 0, 1, 2, 2]
    assert column(catalog, "key", first) == old
    assert column(catalog, "key") == [*old, *new]
    np.testing.assert_array_equal(embeddings(catalog, first), rows)
    check_embeddings(catalog, vectors)
    bytes_after, stamps_after = tree_bytes(catalog.folder), stamps(catalog.folder)
    assert {name for name in bytes_before if bytes_after[name] != bytes_before[name]} == {
        "shards.parquet",
        "snapshots/head.json",
        "embeddings/image/joins.json",
    }
    touched = {path.name for path in stamps_before if stamps_after[path] != stamps_before[path]}
    assert touched == {"shards.parquet", "head.json", "joins.json"}
    assert catalog.rejected() is None


def test_the_same_import_again_does_nothing(run, tmp_path, old, make_vectors, make_embeddings):
    make_embeddings(tmp_path / "old", make_vectors(old), 2)
    catalog = run(tmp_path / "old").catalog
    before = stamps(catalog.folder)
    report = run(tmp_path / "old")
    assert (report.new_shards, report.new_samples, report.columns) == (0, 0, [])
    assert report.snapshot == catalog.snapshot(1)
    assert stamps(catalog.folder) == before


def test_old_and_new_tars_together(run, tmp_path, old, new):
    run(tmp_path / "old")
    report = run(tmp_path / "new", tmp_path / "old")
    assert (report.new_shards, report.new_samples) == (3, 6)
    assert column(report.catalog, "key") == [*old, *new]


def test_a_folder_that_grew(run, tmp_path, make_pool):
    made = make_pool(tmp_path / "pool", [2, 2], first_shard=5)
    run(tmp_path / "pool")
    made |= make_pool(tmp_path / "pool", [1], first_shard=2)  # sorts before the old ones
    report = run(tmp_path / "pool")
    assert report.new_shards == 1
    assert column(report.catalog, "key") == list(itertools.chain(*made.values()))


def test_moved_tars_are_known_after_relocating(run, tmp_path, old):
    catalog = run(tmp_path / "old").catalog
    (tmp_path / "old").rename(tmp_path / "moved")
    catalog.relocate(str(tmp_path / "old"), str(tmp_path / "moved"))
    report = run(tmp_path / "moved")
    assert (report.new_shards, report.snapshot.number) == (0, 1)


# --- embeddings that come later -----------------------------------------------------------------------------------------


def test_embeddings_in_a_later_import(run, tmp_path, old, make_vectors, make_embeddings):
    vectors = make_vectors(old)
    catalog = run(tmp_path / "old").catalog
    before = stamps(catalog.folder)
    report = run(make_embeddings(tmp_path / "embeddings", vectors, 2))
    assert (report.new_shards, report.snapshot.number) == (0, 1)
    check_embeddings(catalog, vectors)
    assert {path: stamp for path, stamp in stamps(catalog.folder).items() if path in before} == before


def test_embeddings_for_the_appended_shards_alone(run, tmp_path, old, new, make_vectors, make_embeddings):
    vectors = make_vectors([*old, *new])
    run(tmp_path / "old", make_embeddings(tmp_path / "first", {key: vectors[key] for key in old}))
    run(tmp_path / "new")
    report = run(make_embeddings(tmp_path / "second", {key: vectors[key] for key in new}))
    check_embeddings(report.catalog, vectors)
    (made,) = report.columns
    assert (made.embedded, made.samples) == (6, 6)
    assert report.catalog.rejected() is None


def test_embeddings_of_old_and_new_samples_in_one_folder(run, tmp_path, old, new, make_vectors, make_embeddings):
    """Those of the old samples are no news, and no fault either."""
    vectors = make_vectors([*old, *new])
    run(tmp_path / "old", make_embeddings(tmp_path / "first", {key: vectors[key] for key in old}))
    others = make_vectors(old, seed=5)
    folder = make_embeddings(tmp_path / "second", {**vectors, **others}, 3)
    report = run(tmp_path / "new", folder)
    check_embeddings(report.catalog, vectors)
    assert report.catalog.rejected() is None


def test_appended_embeddings_have_the_width_of_the_old(run, tmp_path, old, new, make_vectors, make_embeddings):
    run(tmp_path / "old", make_embeddings(tmp_path / "first", make_vectors(old, dimension=8)))
    with pytest.raises(UserError, match="wrong dimension"):
        run(tmp_path / "new", make_embeddings(tmp_path / "second", make_vectors(new, dimension=9)))


def test_imported_embeddings_do_not_mix_with_an_encoders(run, tmp_path, old, new, make_vectors, make_embeddings):
    from tailwise.catalog.embeddings import open_column, write_part

    catalog = run(tmp_path / "old").catalog
    open_column(catalog, "image", 8, "open_clip:ViT-B-32/openai")
    part = catalog.parts()[0]
    write_part(catalog, "image", part, 8, [np.zeros((part.rows, 8), np.float16)])
    before = (catalog.embedding_folder("image") / f"{part.name}.npy").read_bytes()
    with pytest.raises(UserError, match=r"open_clip:ViT-B-32/openai.*encoders can't be mixed"):
        run(make_embeddings(tmp_path / "first", make_vectors(old)))
    assert (catalog.embedding_folder("image") / f"{part.name}.npy").read_bytes() == before


# --- bad tars, and keys that come again ---------------------------------------------------------------------------------


def test_the_same_import_again_with_a_bad_tar_does_nothing(run, tmp_path, old):
    (tmp_path / "old" / "00009.tar").write_bytes(b"<html>not found</html>")
    catalog = run(tmp_path / "old").catalog
    listed = catalog.rejected()
    report = run(tmp_path / "old")
    assert (report.new_shards, report.snapshot.number) == (0, 1)
    assert catalog.rejected().equals(listed)


@pytest.mark.parametrize("part_rows", [5, 100])
def test_rejections_of_the_first_import_outlive_the_second(run, tmp_path, old, new, rejected_counts, part_rows):
    """The bad tar comes after the last good one: with 5 rows a part, it stands alone in a part without samples."""
    (tmp_path / "old" / "00009.tar").write_bytes(b"<html>not found</html>")
    catalog = run(tmp_path / "old", part_rows=part_rows).catalog
    assert rejected_counts(catalog) == {("import", "not a tar"): 1}
    run(tmp_path / "new", part_rows=part_rows)
    assert rejected_counts(catalog) == {("import", "not a tar"): 1}


def test_embeddings_of_a_key_in_old_and_new_tars(run, tmp_path, old, make_pool, make_vectors, make_embeddings):
    """The first tars' embeddings must not be taken for those of new samples that happen to have the same keys."""
    vectors = make_vectors(old)
    run(tmp_path / "old", make_embeddings(tmp_path / "first", vectors))
    make_pool(tmp_path / "other source", [3])  # with the keys of the first tar
    with pytest.raises(UserError, match="ambiguous"):
        run(tmp_path / "other source", tmp_path / "first")


def test_embeddings_may_come_in_two_goes(
    run, tmp_path, old, make_vectors, make_embeddings, tree_bytes, rejected_counts
):
    """Those that are there stay as they are, those that were lacking come in, and again it changes nothing."""
    vectors = make_vectors(old)
    make_embeddings(tmp_path / "one", {key: vectors[key] for key in old[:2]})
    make_embeddings(tmp_path / "two", {key: vectors[key] for key in old[1:]})
    catalog = run(tmp_path / "old", tmp_path / "one").catalog
    assert rejected_counts(catalog) == {("image embeddings", "sample without embedding"): len(old) - 2}
    first = embeddings(catalog)
    report = run(tmp_path / "old", tmp_path / "two")
    assert report.columns[0].embedded == len(old)
    check_embeddings(catalog, vectors)
    np.testing.assert_array_equal(embeddings(catalog)[:2], first[:2])
    assert rejected_counts(catalog) == {}
    after = tree_bytes(catalog.folder)
    assert run(tmp_path / "old", tmp_path / "one").columns == []
    assert tree_bytes(catalog.folder) == after


def test_a_mended_file_of_embeddings_is_taken(run, tmp_path, old, make_vectors, make_embeddings):
    vectors = make_vectors(old)
    folder = make_embeddings(tmp_path / "first", vectors, 2)
    path = folder / "img_emb" / "img_emb_1.npy"
    good = path.read_bytes()
    path.write_bytes(good[:50])
    catalog = run(tmp_path / "old", folder).catalog
    assert not embeddings(catalog)[1].any()
    path.write_bytes(good)
    run(tmp_path / "old", folder)
    check_embeddings(catalog, vectors)


def test_known_embeddings_for_complete_samples_are_no_news(run, tmp_path, old, make_vectors, make_embeddings):
    vectors = make_vectors(old)
    run(tmp_path / "old", make_embeddings(tmp_path / "first", {key: vectors[key] for key in old[:2]}))
    copy = make_embeddings(tmp_path / "copy", {key: vectors[key] for key in old[:2]})
    assert run(copy).rejections.counts == {}


def test_one_tar_by_two_names_is_one_shard(run, tmp_path, old):
    (tmp_path / "link").symlink_to(tmp_path / "old")
    catalog = run(tmp_path / "old", tmp_path / "link").catalog
    assert catalog.snapshot().rows == len(old)
    assert run(tmp_path / "link").new_shards == 0


def test_an_interrupted_import_and_then_another_one(run, tmp_path, old, make_vectors, make_embeddings, interrupted):
    """What the second one finds written is not taken for its own."""
    from tailwise.steps.importing import embeddings as stage

    vectors = make_vectors(old)
    one = make_embeddings(tmp_path / "one", {key: vectors[key] for key in old[::2]})
    two = make_embeddings(tmp_path / "two", {key: vectors[key] for key in old[1::2]})
    catalog = run(tmp_path / "old", part_rows=1).catalog
    real = stage.write_part

    def written(*given, **notes):
        real(*given, **notes)
        return True

    with interrupted(stage, "write_part", written):  # after the first part
        run(one)
    for folder in (two, one, two):
        run(folder)
    check_embeddings(catalog, vectors)


def test_killed_between_rows_and_marker(run, tmp_path, old, make_vectors, make_embeddings, interrupted):
    from tailwise.catalog import embeddings as module
    from tailwise.steps.upkeep.verify import verify

    vectors = make_vectors(old)
    one = make_embeddings(tmp_path / "one", {key: vectors[key] for key in old[::2]})
    two = make_embeddings(tmp_path / "two", {key: vectors[key] for key in old[1::2]})
    catalog = run(tmp_path / "old", one).catalog
    # At the marker, after the rows were renamed into place.
    with interrupted(module, "write_record", lambda _, value: "replaced_by" not in value):
        run(two)
    assert run(two).columns[0].embedded == len(old)
    check_embeddings(catalog, vectors)
    assert verify(catalog)[1] == []


def test_an_interrupted_import_goes_on_with_new_shards(
    run, tmp_path, old, new, make_vectors, make_embeddings, interrupted
):
    from tailwise.steps.importing import embeddings as stage

    vectors = make_vectors([*old, *new])
    folder = make_embeddings(tmp_path / "all", vectors)
    catalog = run(tmp_path / "old").catalog
    with interrupted(stage, "write_part"):
        run(folder)
    run(tmp_path / "new", folder)
    check_embeddings(catalog, vectors)


def test_imported_embeddings_do_not_go_over_an_encoders(run, tmp_path, make_pool, make_vectors, make_embeddings):
    from tailwise.steps.embedding.embed import embed

    (keys,) = make_pool(tmp_path / "drawn", [3]).values()
    catalog = run(tmp_path / "drawn").catalog
    embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    with pytest.raises(UserError, match=r"'pixels'.*encoders can't be mixed"):
        run(make_embeddings(tmp_path / "first", make_vectors(keys, dimension=360)))
