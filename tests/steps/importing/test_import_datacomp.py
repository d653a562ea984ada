"""DataComp's metadata: a pool of its own without images, or scores and embeddings for tars, by uid."""

import itertools
import json
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tailwise.catalog.removals import Removals
from tailwise.cli import app
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export import export
from tailwise.loader.loader import Loader
from tailwise.requests import ClusterRequest, EmbedRequest, PlanRequest, SourceRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

STAGE = "image embeddings"


class Interrupted(BaseException):
    """Like KeyboardInterrupt."""


def uids(first, count):
    return [f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for number in range(first, first + count)]


def arrays(names, dimension=6, seed=0):
    """The four arrays of an .npz; a uid's vectors depend on nothing but the uid and the seed."""
    rows = {name: np.random.default_rng([seed, int(name[:8], 16)]).normal(size=(4, dimension)) for name in names}
    stacked = np.stack([rows[name] for name in names]) if names else np.zeros((0, 4, dimension))
    members = ("l14_img", "l14_txt", "b32_img", "b32_txt")
    return {member: stacked[:, number].astype(np.float16) for number, member in enumerate(members)}


@pytest.fixture
def metadata(tmp_path, make_metadata):
    """Three files in `tmp_path / "metadata"` with 5, 4 and 6 rows; all their uids."""
    names = uids(1, 15)
    for name, part in (("x", slice(0, 5)), ("y", slice(5, 9)), ("z", slice(9, 15))):
        make_metadata(tmp_path / "metadata", name, names[part], arrays(names[part]), compressed=name == "y")
    return names


@pytest.fixture
def make_downloaded(tmp_path, make_tar, make_image):
    """`make_downloaded(name, uids)` writes a tar as img2dataset does of DataComp: uid in the .json, keys of its own."""

    def write(name, names):
        members = []
        for number, uid in enumerate(names):
            key = f"{name}{number:04d}"
            told = json.dumps({"uid": uid, "key": key, "width": 8, "height": 8}).encode()
            members += [(f"{key}.jpg", make_image()), (f"{key}.txt", b"caption"), (f"{key}.json", told)]
        return make_tar(tmp_path / "shards" / f"{name}.tar", members)

    return write


def column(catalog, name):
    return list(itertools.chain(*(catalog.samples(part, [name]).column(0).to_pylist() for part in catalog.parts())))


def uid_texts(catalog):
    return [uid.hex() for uid in column(catalog, "uid")]


def check(catalog, lacking=(), member="l14_img", name="image", dimension=6):
    """Every sample has the unit vector of its uid; those that lack one have zeros."""
    names = uid_texts(catalog)
    expected = arrays(names, dimension)[member].astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    expected[[uid in lacking for uid in names]] = 0
    rows = np.concatenate(catalog.embedding_parts(name, catalog.snapshot()))
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, expected, atol=2e-3)


# --- a pool of its own --------------------------------------------------------------------------------------------------


def test_each_file_is_a_shard(run, tmp_path, metadata):
    report = run(tmp_path)
    catalog = report.catalog
    assert (report.new_shards, report.new_samples, report.snapshot.shards) == (3, 15, 3)
    assert column(catalog, "key") == uid_texts(catalog) == metadata
    shards = catalog.shards().to_pylist()
    assert [(row["path"], row["rows"]) for row in shards] == [
        (str(tmp_path / "metadata" / f"{name}.parquet"), rows) for name, rows in (("x", 5), ("y", 4), ("z", 6))
    ]
    assert catalog.rejected() is None
    assert [(made.column, made.embedded) for made in report.columns] == [("image", 15), ("text", 15)]
    check(catalog)
    check(catalog, member="l14_txt", name="text")


def test_the_other_model(run, tmp_path, metadata):
    check(run(tmp_path, options=SourceRequest(embedding="b32")).catalog, member="b32_img")


def test_the_same_import_again_does_nothing(run, tmp_path, metadata, tree_bytes):
    catalog = run(tmp_path / "metadata").catalog
    before = tree_bytes(catalog.folder)
    report = run(tmp_path / "metadata")
    assert (report.new_shards, report.columns) == (0, [])
    assert tree_bytes(catalog.folder) == before


@pytest.mark.parametrize("part_rows", [1, 5, 100])
def test_parts_make_no_difference(run, tmp_path, metadata, part_rows):
    catalog = run(tmp_path / "metadata", part_rows=part_rows).catalog
    assert uid_texts(catalog) == metadata
    check(catalog)


@pytest.mark.parametrize(
    ("step", "done"),
    [
        ("reading metadata", 1),
        ("reading metadata", 2),
        ("joining image keys", 1),
        ("image embeddings", 1),
        ("text embeddings", 2),
    ],
)
def test_interrupted_and_run_again(run, tmp_path, metadata, tree_bytes, step, done):
    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == (step, done):
                raise Interrupted
            yield item

    whole = tree_bytes(
        import_pool([str(tmp_path / "metadata")], tmp_path / "whole", workers=1, part_rows=1).catalog.folder
    )
    with pytest.raises(Interrupted):
        run(tmp_path / "metadata", context=Context(track), part_rows=1)
    run(tmp_path / "metadata", part_rows=1)
    assert tree_bytes(tmp_path / "catalog") == whole


def test_workers_make_no_difference(run, tmp_path, metadata, tree_bytes):
    one = tree_bytes(run(tmp_path / "metadata").catalog.folder)
    assert tree_bytes(import_pool(str(tmp_path / "metadata"), tmp_path / "two", workers=2).catalog.folder) == one


def test_more_files_later(run, tmp_path, metadata, make_metadata):
    run(tmp_path / "metadata")
    more = uids(50, 3)
    make_metadata(tmp_path / "metadata", "a", more, arrays(more))
    report = run(tmp_path / "metadata")
    assert (report.new_shards, report.new_samples) == (1, 3)
    assert uid_texts(report.catalog) == [*metadata, *more]
    check(report.catalog)


def test_embeddings_downloaded_later(run, tmp_path, make_metadata):
    names = uids(1, 4)
    make_metadata(tmp_path / "metadata", "x", names)
    assert run(tmp_path / "metadata").columns == []
    make_metadata(tmp_path / "metadata", "x", names, arrays(names))
    check(run(tmp_path / "metadata").catalog)


def test_rows_that_are_left_out_do_not_shift_the_embeddings(run, tmp_path, make_metadata, rejected_counts):
    names = uids(1, 6)
    given = [names[0], "bad", names[1], names[0], names[2], names[3], None, names[4]]
    rows = arrays(names[:1] * len(given))
    rows = {name: np.array(value) for name, value in rows.items()}
    for at, uid in enumerate(given):
        if uid in names:
            for name, value in arrays([uid]).items():
                rows[name][at] = value[0]
    rows["l14_img"][3] = 7  # the twin's own
    rows["l14_img"][5] = np.nan
    make_metadata(tmp_path / "metadata", "x", given, rows)
    catalog = run(tmp_path / "metadata").catalog
    assert uid_texts(catalog) == names[:5]
    check(catalog, lacking=[names[3]])
    counts = rejected_counts(catalog)
    assert counts["import", "uid is not 32 hexadecimal digits"] == 2
    assert counts["import", "duplicate key"] == 1
    assert counts[STAGE, "NaN or Inf"] == 1
    assert counts[STAGE, "duplicate embedding"] == 1


def test_a_uid_in_two_files_is_two_samples(run, tmp_path, make_metadata):
    names = uids(1, 3)
    make_metadata(tmp_path / "metadata", "x", names, arrays(names))
    make_metadata(tmp_path / "metadata", "y", names[1:], arrays(names[1:], seed=1))
    catalog = run(tmp_path / "metadata").catalog
    assert uid_texts(catalog) == [*names, *names[1:]]
    rows = np.concatenate(catalog.embedding_parts("image", catalog.snapshot())).astype(np.float64)
    other = arrays(names[1:], seed=1)["l14_img"].astype(np.float64)
    np.testing.assert_allclose(rows[3:], other / np.linalg.norm(other, axis=1, keepdims=True), atol=2e-3)
    assert catalog.rejected() is None


@pytest.mark.parametrize("fault", ["missing", "truncated", "length", "pickled", "no member"])
def test_one_npz_that_can_not_be_used(run, tmp_path, metadata, rejected_counts, fault):
    path = tmp_path / "metadata" / "y.npz"
    content = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "length":
        np.savez(path, **arrays(metadata[:3]))
    elif fault == "pickled":
        np.savez(path, l14_img=np.array([{}] * 4, object), l14_txt=arrays(metadata[5:9])["l14_txt"])
    elif fault == "no member":
        np.savez(path, l14_txt=arrays(metadata[5:9])["l14_txt"])
    catalog = run(tmp_path / "metadata").catalog
    check(catalog, lacking=metadata[5:9])
    reason = {"missing": "no .npz beside the metadata", "length": "rows differ from metadata"}
    counts = rejected_counts(catalog)
    assert (STAGE, reason.get(fault, "unreadable embeddings")) in counts
    assert counts[STAGE, "sample without embedding"] == 4


def test_a_damaged_parquet_among_good_ones(run, tmp_path, metadata, rejected_counts):
    (tmp_path / "metadata" / "y.parquet").write_bytes(b"junk")
    catalog = run(tmp_path / "metadata").catalog
    assert uid_texts(catalog) == [*metadata[:5], *metadata[9:]]
    check(catalog)
    assert rejected_counts(catalog)["import", "unreadable metadata"] == 0
    assert run(tmp_path / "metadata").new_shards == 0


def test_a_changed_file_is_named_and_replaced(run, tmp_path, metadata, make_metadata):
    for path in (tmp_path / "metadata").glob("*.npz"):
        path.unlink()
    catalog = run(tmp_path / "metadata").catalog
    before = catalog.snapshot().rows
    make_metadata(tmp_path / "metadata", "x", uids(80, 9))
    report = run(tmp_path / "metadata")
    assert report.changed == [str(tmp_path / "metadata" / "x.parquet")] and report.new_shards == 0
    report = run(tmp_path / "metadata", update=True)
    assert (report.changed, report.new_samples) == ([], 9)
    assert catalog.snapshot().rows - len(Removals.of(catalog).rows) == before + 4


def test_moved_metadata(run, tmp_path, make_metadata):
    names = uids(1, 4)
    make_metadata(tmp_path / "metadata", "x", names)
    catalog = run(tmp_path / "metadata").catalog
    (tmp_path / "metadata").rename(tmp_path / "moved")
    catalog.relocate(str(tmp_path / "metadata"), str(tmp_path / "moved"))
    np.savez(tmp_path / "moved" / "x.npz", **arrays(names))
    assert run(tmp_path / "moved").new_shards == 0
    check(catalog)


def test_nothing_good(run, tmp_path, make_metadata):
    make_metadata(tmp_path / "metadata", "x", ["bad", "worse"])
    with pytest.raises(
        UserError, match=r"no sample with uid or URL, and caption in 1 new file.*32 hexadecimal digits: 2"
    ):
        run(tmp_path / "metadata")


# --- what follows -------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(run, tmp_path, make_metadata):
    names = uids(1, 120)
    for name, part in (("x", slice(0, 70)), ("y", slice(70, 120))):
        make_metadata(tmp_path / "metadata", name, names[part], arrays(names[part]))
    catalog = run(tmp_path / "metadata").catalog
    cluster(catalog, ClusterRequest(k=4, force=True))
    return make_plan(catalog, "half", PlanRequest("dynamics", keep=0.5))


def test_a_plan_of_metadata_is_exported_for_datacomp(planned, tmp_path):
    path = tmp_path / "subset.npy"
    assert export(planned, "datacomp", path, epoch=0) == 60
    subset = np.load(path)
    assert subset.dtype == np.dtype("u8,u8")
    drawn = {f"{high:016x}{low:016x}" for high, low in subset.tolist()}
    assert len(drawn) == 60
    copies = planned.draw(0)
    assert drawn == {uid for uid, count in zip(uid_texts(planned.catalog), copies, strict=True) if count}


def test_scores_of_metadata_are_columns(planned):
    scores = column(planned.catalog, "clip_l14_similarity_score")
    np.testing.assert_allclose(scores, [*(np.arange(70) / 10), *(np.arange(50) / 10)], rtol=1e-6)


def fails(task):
    with pytest.raises(UserError) as caught:
        task()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_needs_images_refuses(planned, tmp_path):
    from tailwise.requests import TrainRequest
    from tailwise.train.launch import train

    for task in (
        lambda: Loader(planned, batch_size=8, lanes=8),
        lambda: export(planned, "shards", tmp_path / "out", epoch=0),
        lambda: train(planned, [], TrainRequest()),
    ):
        assert "2 file(s) of metadata have no images" in fails(task)
    assert not (tmp_path / "out").exists()


def test_embed_refuses(run, tmp_path, make_metadata):
    make_metadata(tmp_path / "metadata", "x", uids(1, 4))
    catalog = run(tmp_path / "metadata").catalog
    assert "4 samples in 1 file(s) of metadata have no image" in fails(
        lambda: embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    )


def test_plans_that_draw_tars_alone_are_read(run, tmp_path, make_metadata, make_pool):
    """A catalog of both kinds: a plan by rates leaves the metadata's samples out."""

    (keys,) = make_pool(tmp_path / "pool", [8]).values()
    run(tmp_path / "pool")
    make_metadata(tmp_path / "metadata", "x", uids(1, 4))
    catalog = run(tmp_path / "metadata").catalog
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(dict.fromkeys(keys, 1.0)))
    plan = make_plan(catalog, "tars", PlanRequest("rates", rates=rates, missing_rate=0))
    loader = Loader(plan, batch_size=4, lanes=4, check="index")
    assert set(next(iter(loader)).rows.tolist()) <= set(range(8))
    loader.close()
    with_both = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    assert "have no images" in fails(lambda: Loader(with_both, batch_size=4, lanes=4))


# --- beside tars --------------------------------------------------------------------------------------------------------


def test_tars_get_scores_and_embeddings_by_uid(run, tmp_path, metadata, make_downloaded):
    make_downloaded("00000", [metadata[7], metadata[2], metadata[14]])
    make_downloaded("00001", [metadata[0], metadata[9]])
    report = run(tmp_path)
    catalog = report.catalog
    assert (report.snapshot.shards, report.snapshot.rows) == (2, 5)
    assert uid_texts(catalog) == [metadata[at] for at in (7, 2, 14, 0, 9)]
    check(catalog)
    check(catalog, member="l14_txt", name="text")
    np.testing.assert_allclose(column(catalog, "clip_l14_similarity_score"), [0.2, 0.2, 0.5, 0, 0], atol=1e-6)
    assert column(catalog, "width") == [8] * 5  # of the stored images, not of the originals
    assert {name for _, name in (row for row in report.rejections.counts)} == {
        "embedding without sample",
        "row without sample",
    }
    assert report.rejections.counts["scores of metadata", "row without sample"] == len(metadata) - 5


def test_each_row_of_metadata_is_a_samples_or_counted(run, tmp_path, metadata, make_downloaded, make_metadata):
    (twice,) = uids(50, 1)
    make_metadata(tmp_path / "metadata", "odd", [None, "", twice, twice, *uids(60, 2)])
    make_downloaded("00000", [*metadata[:3], twice])
    counts = run(tmp_path).rejections.counts
    # Of the 15 rows and these 6, three samples have one each.
    assert counts["scores of metadata", "row without uid"] == 2
    assert counts["scores of metadata", "row without sample"] == 15 + 6 - 2 - 3
    assert counts["import", "ambiguous uid"] == 1


def test_scores_of_a_sidecar_stay(run, tmp_path, metadata, make_downloaded):
    import pyarrow as pa

    tar = make_downloaded("00000", metadata[3:5])
    sidecar = {"key": ["000000000", "000000001"], "clip_l14_similarity_score": [9.0, None], "own": [1.0, 2.0]}
    pq.write_table(pa.table({**sidecar, "status": ["success"] * 2}), tar.with_suffix(".parquet"))
    catalog = run(tmp_path).catalog
    np.testing.assert_allclose(column(catalog, "clip_l14_similarity_score"), [9, 0.4], atol=1e-6)
    assert column(catalog, "own") == [1, 2]


def test_samples_that_the_metadata_does_not_know(
    run, tmp_path, metadata, make_downloaded, rejected_counts, make_metadata
):
    stranger = uids(99, 1)
    twice = metadata[3]
    make_metadata(tmp_path / "metadata", "again", [twice], arrays([twice]), clip_l14_similarity_score=[5.0])
    make_downloaded("00000", [metadata[1], *stranger, twice])
    catalog = run(tmp_path).catalog
    scores = column(catalog, "clip_l14_similarity_score")
    assert scores[1:] == [None, None]
    check(catalog, lacking=stranger)
    counts = rejected_counts(catalog)
    assert counts["import", "ambiguous uid"] == 1
    assert counts[STAGE, "duplicate embedding"] == 1
    assert counts[STAGE, "sample without embedding"] == 1


def test_a_sample_that_is_in_two_tars(run, tmp_path, metadata, make_downloaded, rejected_counts):
    make_downloaded("00000", metadata[:2])
    make_downloaded("00001", metadata[1:3])
    catalog = run(tmp_path).catalog
    check(catalog, lacking=[metadata[1]])
    assert rejected_counts(catalog)[STAGE, "ambiguous uid"] == 1


def test_metadata_after_its_tars_needs_them_named(run, tmp_path, metadata, make_downloaded):
    make_downloaded("00000", metadata[:4])
    run(tmp_path / "shards")
    assert "name the shards in the same import" in fails(lambda: run(tmp_path / "metadata"))
    report = run(tmp_path / "shards", tmp_path / "metadata")
    assert (report.new_shards, report.snapshot.rows) == (0, 4)
    check(report.catalog)


def test_metadata_of_another_pool_joins_a_catalog_of_tars(run, tmp_path, metadata, make_pool):
    make_pool(tmp_path / "pool", [3])
    run(tmp_path / "pool")
    report = run(tmp_path / "metadata")
    assert report.snapshot.rows == 18
    assert uid_texts(report.catalog)[3:] == metadata


@pytest.mark.parametrize("first_with", [False, True])
def test_scores_after_an_interruption(run, tmp_path, metadata, make_downloaded, tree_bytes, first_with):
    """A part that was finished without scores is made anew with them; one that has them stays."""
    for number in range(3):
        make_downloaded(f"{number:05d}", metadata[number * 5 : number * 5 + 3])
    sources = [str(tmp_path / "shards"), str(tmp_path / "metadata")]
    whole = tree_bytes(import_pool(sources, tmp_path / "whole", workers=1, part_rows=1).catalog.folder)

    def track(items, description, total=None):
        for position, item in enumerate(items):
            if (description, position) == ("indexing tars", 2):
                raise Interrupted
            yield item

    with pytest.raises(Interrupted):
        run(*sources[: 1 + first_with], part_rows=1, context=Context(track))
    run(*sources, part_rows=1)
    assert tree_bytes(tmp_path / "catalog") == whole


def test_damaged_metadata_beside_tars(run, tmp_path, metadata, make_downloaded, rejected_counts):
    make_downloaded("00000", [metadata[0], metadata[6]])
    (tmp_path / "metadata" / "y.parquet").write_bytes(b"junk")
    catalog = run(tmp_path).catalog
    assert column(catalog, "clip_l14_similarity_score") == [0.0, None]
    check(catalog, lacking=[metadata[6]])
    assert ("import", "unreadable metadata") in rejected_counts(catalog)


# --- the command line ---------------------------------------------------------------------------------------------------


def test_the_command_line_from_metadata_to_subset(tmp_path, make_metadata):
    names = uids(1, 60)
    make_metadata(tmp_path / "pool" / "metadata", "x", names, arrays(names))
    catalog = str(tmp_path / "catalog")
    for words in (
        ["import", str(tmp_path / "pool"), catalog, "--embedding", "b32", "--workers", "1"],
        ["filter", catalog, "--by", "clip_l14_similarity_score", "--keep", "0.5", "--name", "good"],
        ["cluster", catalog, "--clusters", "3", "--without", "good", "--force"],
        ["plan", catalog, "subset", "--method", "flat", "--keep", "0.25"],
        ["export", catalog, "subset", "--to", "datacomp", str(tmp_path / "subset.npy"), "--epoch", "0"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
    high, low = np.load(tmp_path / "subset.npy")[0].tolist()
    assert f"{high:016x}{low:016x}" in names[30:]  # the half of higher score


def test_zip_files_without_arrays(run, tmp_path, metadata, rejected_counts):
    with zipfile.ZipFile(tmp_path / "metadata" / "y.npz", "w") as archive:
        archive.writestr("l14_img.npy", b"no array")
    catalog = run(tmp_path / "metadata").catalog
    assert (STAGE, "unreadable embeddings") in rejected_counts(catalog)
