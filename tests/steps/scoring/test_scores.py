import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog import Catalog
from tailwise.catalog.files import note_digest, read_record, write_record
from tailwise.errors import ConflictError, UserError
from tailwise.kernels.scores import clip_loss
from tailwise.requests import ClusterRequest, EmbedRequest, FilterRequest, GroupRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.embedding.embed import embed
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring import makers as score_makers
from tailwise.steps.scoring.filter import filter_samples, try_filter
from tailwise.steps.scoring.scores import score_config, score_inputs, score_parts
from tailwise.steps.upkeep.delete import delete
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify

KEYS = [f"{row:06d}" for row in range(600)]


def score(catalog, name, **options):
    return np.concatenate(list(score_parts(catalog, catalog.snapshot(), ScoreRequest(name, options))))


def column(catalog, name):
    return np.concatenate(catalog.embedding_parts(name, catalog.snapshot())).astype(np.float64)


@pytest.fixture(scope="session")
def paired_source(_small_catalog_source, tmp_path_factory, make_embeddings):
    """A copy of the small catalog with text embeddings near the image ones; rows 10 and 500 have no text, row 77 no image."""
    folder = tmp_path_factory.mktemp("paired")
    shutil.copytree(_small_catalog_source / "catalog", folder / "catalog")
    from tailwise.catalog import Catalog

    catalog = Catalog.open(folder / "catalog")
    image = column(catalog, "image")
    noise = np.random.default_rng(3).normal(scale=0.2, size=image.shape)
    vectors = dict(zip(KEYS, image + noise, strict=True))
    del vectors[KEYS[10]], vectors[KEYS[500]]
    import_pool([str(make_embeddings(folder / "text", vectors, column="text"))], catalog.folder, workers=1)
    path = catalog.embedding_folder("image") / "part-000000.npy"
    rows = np.load(path)
    rows[77] = 0
    np.save(path, rows)
    note_digest(path)
    return folder / "catalog"


@pytest.fixture
def paired(paired_source, tmp_path):
    from tailwise.catalog import Catalog

    shutil.copytree(paired_source, tmp_path / "paired")
    return Catalog.open(tmp_path / "paired")


def test_clip_score_is_the_cosine_and_absent_without_either(paired):
    found = score(paired, "clip-score")
    image, text = column(paired, "image"), column(paired, "text")
    with np.errstate(invalid="ignore"):
        plain = (image * text).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)
    assert np.flatnonzero(np.isnan(found)).tolist() == [10, 77, 500]
    np.testing.assert_array_max_ulp(found[~np.isnan(found)], plain[~np.isnan(found)].astype(np.float32))
    assert found.dtype == np.float32


def test_cliploss_in_one_batch_is_that_of_all_pairs(paired):
    found = score(paired, "cliploss")
    there = ~np.isnan(found)
    assert np.flatnonzero(~there).tolist() == [10, 77, 500]
    image, text = (column(paired, name).astype(np.float16)[there] for name in ("image", "text"))
    assert np.array_equal(found[there], clip_loss(image, text, 0.01).astype(np.float32))
    assert np.array_equal(found, score(paired, "cliploss", repetitions=1, seed=9), equal_nan=True)


def test_cliploss_averages_over_equal_random_batches(paired, monkeypatch):
    seen = []

    def noted(image, text, temperature):
        losses = clip_loss(image, text, temperature)
        seen.append(({row.tobytes(): loss for row, loss in zip(image, losses, strict=True)}, temperature))
        return losses

    monkeypatch.setattr(score_makers, "clip_loss", noted)
    several = score(paired, "cliploss", batch_size=100, repetitions=3, temperature=0.05)
    assert [len(batch) for batch, _ in seen] == [99, 100, 99, 100, 99, 100] * 3  # 597 pairs
    assert {temperature for _, temperature in seen} == {0.05}
    assert seen[0][0].keys() != seen[6][0].keys()  # drawn anew
    image = column(paired, "image").astype(np.float16)
    for row in np.flatnonzero(~np.isnan(several)):
        losses = [np.float32(batch[image[row].tobytes()]) for batch, _ in seen if image[row].tobytes() in batch]
        assert len(losses) == 3
        assert several[row] == np.float32(sum(map(float, losses)) / 3)
    several = score(paired, "cliploss", batch_size=100, repetitions=3)
    # A smaller batch gives less anyway; the order of the pairs stays much the same.
    whole = score(paired, "cliploss")
    there = ~np.isnan(whole)
    assert (several[there] > whole[there]).mean() > 0.95
    assert np.corrcoef(several[there], whole[there])[0, 1] > 0.9
    assert not np.array_equal(several, score(paired, "cliploss", batch_size=100, repetitions=3, seed=1), equal_nan=True)


def test_cliploss_goes_on_after_an_interruption_with_the_same_bytes(paired, interrupted, watched, tree_bytes):
    options = {"batch_size": 150, "repetitions": 3}
    with interrupted(score_makers, "clip_loss", lambda *_: len(calls) == 7) as calls:  # in the second of four batches
        score(paired, "cliploss", **options)
    with watched(score_makers, "clip_loss") as calls:
        score(paired, "cliploss", **options)
    assert len(calls) == 8  # the first repetition isn't made again
    resumed = tree_bytes(paired.folder / "scores")
    shutil.rmtree(paired.folder / "scores")
    score(paired, "cliploss", **options)
    assert tree_bytes(paired.folder / "scores") == resumed
    assert sorted(path.split("/")[1] for path in resumed if "/" in path) == [
        "manifest.json", "score-part-000000.npy", "score-part-000001.npy"
    ]  # fmt: skip


def targets(paired, tmp_path):
    """The same 40 target rows, in each of the three forms."""
    rows = column(paired, "image")[:40]
    np.save(tmp_path / "target.npy", (3 * rows).astype(np.float32))  # of any norm
    return rows, tmp_path / "target.npy"


def test_normsim_against_a_plain_reference(paired, tmp_path):
    rows, path = targets(paired, tmp_path)
    x = column(paired, "image")
    with np.errstate(invalid="ignore"):
        cosine = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    for norm, plain in {"2": np.linalg.norm(cosine, axis=1), "inf": np.abs(cosine).max(1)}.items():
        found = score(paired, "normsim", target=str(path), norm=norm)
        assert np.flatnonzero(np.isnan(found)).tolist() == [77]
        np.testing.assert_allclose(found, plain, rtol=2e-4)  # the target is rounded to float16
    assert score_config(ScoreRequest("normsim", {"target": "x"})) == {"name": "normsim", "norm": "2"}


def test_targets_in_any_form_are_the_same(paired, small_catalog, tmp_path, make_embeddings):
    rows = column(small_catalog, "image")
    np.save(tmp_path / "target.npy", rows.astype(np.float16))
    folder = make_embeddings(tmp_path / "folder", dict(zip(KEYS, rows, strict=True)), partitions=3)
    for norm in ("2", "inf"):
        forms = [tmp_path / "target.npy", folder, small_catalog.folder]
        found = [score(paired, "normsim", target=str(form), norm=norm) for form in forms]
        assert np.array_equal(found[0], found[1], equal_nan=True)
        assert np.array_equal(found[0], found[2], equal_nan=True)


def test_rows_of_the_target_that_are_none_are_left_out(paired, tmp_path):
    rows = column(paired, "image")[:5].astype(np.float32)
    np.save(tmp_path / "good.npy", rows)
    np.save(tmp_path / "bad.npy", np.concatenate([rows[:2], np.zeros((3, 16)), rows[2:], np.full((1, 16), np.nan)]))
    for norm in ("2", "inf"):
        good, bad = (
            score(paired, "normsim", target=str(tmp_path / f"{name}.npy"), norm=norm) for name in ("good", "bad")
        )
        assert np.array_equal(good, bad, equal_nan=True)


def test_scores_depend_on_neither_chunks_nor_threads(paired, tmp_path, small_pieces, tree_bytes):
    _, path = targets(paired, tmp_path)

    def make():
        score(paired, "clip-score")
        score(paired, "cliploss", batch_size=200, repetitions=2)
        for norm in ("2", "inf"):
            score(paired, "normsim", target=str(path), norm=norm)
        made = tree_bytes(paired.folder / "scores")
        shutil.rmtree(paired.folder / "scores")
        return made

    first = make()
    with small_pieces():
        assert make() == first
    assert sum("/" in path for path in first) == 4 * 3  # besides the locks


def test_clusters_near_a_target_are_those_of_datacomps_rule(paired, tmp_path, small_pieces):
    """The nearest pool centroid of a sample is the nearest of a target image: whole clusters, against NumPy."""
    made = cluster(paired, ClusterRequest(k=40, seed=2))
    rows = np.random.default_rng(0).normal(size=(25, 16)) + 2 * column(paired, "image")[100:125]
    np.save(tmp_path / "target.npy", rows.astype(np.float32))
    centroids = np.asarray(made.centroids, np.float64)
    counts = np.bincount((rows @ centroids.T).argmax(1), minlength=40)
    nearest = (column(paired, "image") @ centroids.T).argmax(1)
    expected = counts[nearest].astype(np.float32)
    expected[77] = np.nan  # no embedding, so no cluster
    options = {"target": str(tmp_path / "target.npy")}
    found = score(paired, "near-target", **options)
    assert np.array_equal(found, expected, equal_nan=True)
    with small_pieces():
        shutil.rmtree(paired.folder / "scores")
        assert np.array_equal(found, score(paired, "near-target", **options), equal_nan=True)
    for request, least in (
        (FilterRequest("near-target", **options), 1),
        (FilterRequest("near-target", 2, **options), 2),
    ):
        summary = filter_samples(paired, replace(request, name=f"least-{least}")).summary
        assert summary["kept"] == np.nansum(expected >= least)
        assert (summary["clusters"], summary["clusters_near"]) == (40, np.count_nonzero(counts))
        assert try_filter(paired, request).summary == summary
    with pytest.raises(ConflictError, match=r"drops/least-1, drops/least-2 were made from clusters/main"):
        delete(paired, ["clusters/main"])


def test_a_target_catalog_is_of_the_same_encoder(tmp_path, make_tar, make_image):
    for name in ("pool", "theirs"):
        images = {
            f"{at}.{suffix}": make_image(at) if suffix == "jpg" else b"c"
            for at in range(12)
            for suffix in ("jpg", "txt")
        }
        make_tar(tmp_path / f"{name}-tars" / "0.tar", [*images.items()])
        import_pool([str(tmp_path / f"{name}-tars")], tmp_path / name, workers=1)
        embed(Catalog.open(tmp_path / name), EmbedRequest(encoder="pixels", workers=1))
    pool, theirs = (Catalog.open(tmp_path / name) for name in ("pool", "theirs"))
    cluster(pool, ClusterRequest(k=2))
    for name in ("normsim", "near-target"):
        assert not np.isnan(score(pool, name, target=str(theirs.folder))).any()
    record = theirs.embedding_folder("image") / "column.json"
    made = dict(read_record(record))
    write_record(record, {**made, "settings": {**made["settings"], "model": "ViT-B-32", "weights": "laion2b"}})
    for name in ("normsim", "near-target"):
        with pytest.raises(
            UserError,
            match="theirs was embedded by model ViT-B-32, weights laion2b, and the catalog's images by model pixels, ",
        ):
            score(pool, name, target=str(theirs.folder))


def test_clusters_near_a_target_need_centroids_of_this_snapshot(small_catalog, tmp_path, make_pool):
    np.save(tmp_path / "target.npy", np.ones((3, 16), np.float32))
    np.save(tmp_path / "wide.npy", np.ones((3, 17), np.float32))
    group(small_catalog, GroupRequest("shard"))
    for name, target, told in (
        ("shard", "target", "`clustering` 'shard' has no centroids"),
        ("none", "target", "no clustering named 'none'"),
        ("main", "wide", r"holds float32 \[3, 17\], and the catalog's image embeddings have 16 dimensions"),
    ):
        if name == "main":
            cluster(small_catalog, ClusterRequest(k=4))
        with pytest.raises(UserError, match=told):
            score(small_catalog, "near-target", target=str(tmp_path / f"{target}.npy"), clustering=name)
    make_pool(tmp_path / "more", [5])
    import_pool([str(tmp_path / "more")], small_catalog.folder, workers=1)
    with pytest.raises(
        UserError, match=r"'main' was made for snapshot 1, and this is for 2: make one with .*--extends main"
    ):
        score(small_catalog, "near-target", target=str(tmp_path / "target.npy"))


@pytest.fixture(scope="session")
def described(tmp_path_factory, make_tar, make_image):
    """Samples of three shards that say much about themselves, in one part and in three: [(shard, caption, width, height, extra)]."""
    folder = tmp_path_factory.mktemp("described")
    random = np.random.default_rng(5)
    captions = ["a dog", " two  spaces ", "", "Straße\tein\nzwei", "日本 語", "e\u0301a", "x" * 400]
    samples = []
    for shard in range(3):
        rows = []
        members = []
        for number in range(8):
            caption = captions[(shard + number) % len(captions)]
            width, height = (int(side) for side in random.integers(1, 2000, 2))
            key = f"{shard}{number:03d}"
            members += [(f"{key}.jpg", make_image(number, side=8 + shard)), (f"{key}.txt", caption.encode())]
            rows.append({"key": key, "status": "success", "width": width, "height": height, "taste": number / 3})
            samples.append((shard, key, caption, width, height, number / 3))
        make_tar(folder / "pool" / f"{shard:05d}.tar", members)
        if shard != 1:  # one shard has no sidecar
            pq.write_table(pa.Table.from_pylist(rows), folder / "pool" / f"{shard:05d}.parquet")
    for part_rows in (8, 1000):
        import_pool([str(folder / "pool")], folder / str(part_rows), workers=1, part_rows=part_rows)
    return folder, samples


@pytest.mark.parametrize("part_rows", [8, 1000])
def test_scores_of_the_samples_themselves(described, part_rows):
    from tailwise.catalog import Catalog

    folder, samples = described
    catalog = Catalog.open(folder / str(part_rows))
    assert len(catalog.parts()) == {8: 3, 1000: 1}[part_rows]
    image_bytes = [size for part in catalog.parts() for size in catalog.samples(part)["image_bytes"].to_pylist()]
    expected = {
        "caption-characters": [len(caption) for _, _, caption, *_ in samples],
        "caption-words": [len(caption.split()) for _, _, caption, *_ in samples],
        "image-bytes": image_bytes,
        "image_bytes": image_bytes,
    }
    known = [sample if sample[0] != 1 else (*sample[:3], *[np.nan] * 3) for sample in samples]
    expected |= {
        "width": [width for *_, width, _, _ in known],
        "height": [height for *_, height, _ in known],
        "pixels": [width * height for *_, width, height, _ in known],
        "aspect-ratio": [max(width, height) / min(width, height) for *_, width, height, _ in known],
        "taste": [taste for *_, taste in known],
    }
    for name, values in expected.items():
        assert np.array_equal(score(catalog, name), np.array(values, np.float32), equal_nan=True), name
    with pytest.raises(UserError, match=r"no score 'smell': use clip-score, .*image_bytes.*taste.*`file`"):
        score(catalog, "smell")


@pytest.mark.parametrize("identifier", ["key", "uid"])
def test_a_column_of_a_file_is_joined(small_catalog, tmp_path, identifier):
    names = KEYS
    if identifier == "uid":
        parts = [small_catalog.samples(part, ["uid"])["uid"].to_pylist() for part in small_catalog.parts()]
        names = [uid.hex() for part in parts for uid in part]
    values = np.random.default_rng(0).normal(size=600)
    order = np.random.default_rng(1).permutation(600)[:550]
    given = pa.array(values[order], pa.float64(), mask=order % 100 == 7)
    table = pa.table(
        {identifier: [*(names[row] for row in order), "stranger"], "width": pa.concat_arrays([given, given[:1]])}
    )
    pq.write_table(table, tmp_path / "s.parquet")
    found = score(small_catalog, "width", file=str(tmp_path / "s.parquet"))
    expected = np.full(600, np.nan, np.float32)
    told = order[order % 100 != 7]
    expected[told] = values[told]
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_file_of_another_pool_is_refused(small_catalog, tmp_path):
    """A file may lack samples, or name samples that the catalog lacks; one that does both, above the bound, is of another pool."""

    def write(named, strangers):
        keys = [*KEYS[:named], *(f"stranger {number}" for number in range(strangers))]
        pq.write_table(pa.table({"key": keys, "q": np.arange(float(len(keys)))}), tmp_path / "s.parquet")
        return str(tmp_path / "s.parquet")

    for named, strangers in ((60, 0), (600, 6000), (300, 33)):
        found = score(small_catalog, "q", file=write(named, strangers))
        assert int((~np.isnan(found)).sum()) == named
    told = (
        r"150 of 600 rows \(25.0%\) belong to no sample, such as 'stranger 0', and 150 of 600 samples \(25.0%\) have no score, "
        "both more than `max_rejected` 0.1"
    )
    with pytest.raises(UserError, match=told):
        score(small_catalog, "q", file=write(450, 150))
    found = score(small_catalog, "q", file=write(450, 150), max_rejected=0.25)
    assert int((~np.isnan(found)).sum()) == 450
    with pytest.raises(UserError, match="`max_rejected` 2: must be between 0 and 1"):
        score(small_catalog, "q", file=write(450, 150), max_rejected=2)
    with pytest.raises(UserError, match="`max_rejected` does nothing with the score 'width'"):
        score(small_catalog, "width", max_rejected=0.5)


def test_a_score_is_made_once_and_anew_when_its_inputs_change(small_catalog, tmp_path, monkeypatch):
    path = tmp_path / "s.parquet"

    def write(scale):
        pq.write_table(pa.table({"key": KEYS, "q": np.arange(600.0) * scale}), path)

    write(1)
    first = score(small_catalog, "q", file=str(path))
    inputs = score_inputs(small_catalog, small_catalog.snapshot(), ScoreRequest("q", {"file": str(path)}))
    with monkeypatch.context() as patched:
        patched.setattr(score_makers, "read_list", None)  # a second making would call it
        assert np.array_equal(score(small_catalog, "q", file=str(path)), first)
        shutil.copy(path, tmp_path / "moved.parquet")
        assert np.array_equal(score(small_catalog, "q", file=str(tmp_path / "moved.parquet")), first)
    write(2)
    assert np.array_equal(score(small_catalog, "q", file=str(path)), 2 * first)
    assert inputs != score_inputs(small_catalog, small_catalog.snapshot(), ScoreRequest("q", {"file": str(path)}))
    assert len(list((small_catalog.folder / "scores").glob("q-*/manifest.json"))) == 2


def test_status_and_verify_know_of_scores(small_catalog):
    before = verify(small_catalog)[0]
    score(small_catalog, "caption-words")
    found = status(small_catalog)["scores"]
    assert [(item["score"], item["state"]) for item in found] == [("{'name': 'caption-words'}", "complete")]
    assert verify(small_catalog) == (before + 2 + 1, [])  # two parts, and the manifest
    path = next((small_catalog.folder / "scores").glob("*/score-part-000001.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert verify(small_catalog) == (before + 2 + 1, [path])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nonsense", {}, "no score 'nonsense': use clip-score, cliploss"),
        ("caption", {}, "no score 'caption'"),  # not a number
        ("clip-score", {}, "600 of 600 samples have no text embeddings"),
        (
            "clip-score",
            {"temperature": 0.1},
            "`temperature` does nothing with the score 'clip-score', which takes `image`, `text`",
        ),
        (
            "cliploss",
            {"norm": "2"},
            "`norm` does nothing with the score 'cliploss', which takes `batch_size`, `repetitions`",
        ),
        ("cliploss", {"batch_size": 1}, "`batch_size` 1: must be between 2"),
        ("cliploss", {"batch_size": 2.5}, "`batch_size` 2.5: must be between 2"),
        ("cliploss", {"repetitions": 0}, "`repetitions` 0: must be between 1"),
        ("cliploss", {"temperature": 0.004}, r"`temperature` 0.004: must be between 0\.005 and 100"),
        ("cliploss", {"temperature": float("nan")}, "`temperature` nan"),
        ("normsim", {}, "the score 'normsim' needs `target`"),
        ("normsim", {"target": "x", "norm": "3"}, "`norm` 3: must be one of 2, inf"),
        ("normsim", {"target": "nowhere"}, "`target` nowhere: give a .npy file"),
        ("q", {"file": "nowhere.parquet"}, "`file` nowhere.parquet is no file"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(small_catalog, name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        score(small_catalog, name, **options)
    assert "\n" not in str(caught.value)
    assert not (small_catalog.folder / "scores").exists()


def test_bad_targets_and_files_are_one_line(small_catalog, tmp_path):
    np.save(tmp_path / "narrow.npy", np.ones((4, 15)))
    np.save(tmp_path / "flat.npy", np.ones(16))
    np.save(tmp_path / "whole.npy", np.ones((4, 16), np.int64))
    np.save(tmp_path / "zeros.npy", np.zeros((4, 16)))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "empty").mkdir()
    for target, message in {
        "narrow.npy": r"float64 \[4, 15\], and the catalog's image embeddings have 16 dimensions",
        "flat.npy": r"float64 \[16\]",
        "whole.npy": r"int64 \[4, 16\]",
        "zeros.npy": "not one of its 4 rows is an embedding",
        "broken.npy": "can't be read as .npy",
        "empty": "give a .npy file of image embeddings",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            score(small_catalog, "normsim", target=str(tmp_path / target))
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"key": ["stranger"], "q": [1.0], "words": ["a"]}), tmp_path / "strange.parquet")
    pq.write_table(pa.table({"key": [KEYS[3], KEYS[3]], "q": [1.0, 2.0]}), tmp_path / "twice.parquet")
    for file, name, message in (
        (
            "strange.parquet",
            "q",
            r"1 of 1 rows \(100.0%\) belong to no sample, such as 'stranger', and 600 of 600 samples",
        ),
        (
            "strange.parquet",
            "r",
            "needs the column 'r' and one of uid, shard, key, image_path, sha256, md5, url; it has key, q, words",
        ),
        ("strange.parquet", "words", "the scores of .*strange.parquet can't be read: .*words"),
        ("twice.parquet", "q", "the score of '000003' is given twice"),
        ("broken.npy", "q", "the scores of .*broken.npy can't be read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            score(small_catalog, name, file=str(tmp_path / file))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "encoding"), [("tsv", "utf-16"), ("csv", "utf-8-sig"), ("tsv", "utf-8")])
def test_scores_of_text_files_are_joined_by_the_keys_of_lists(small_catalog, tmp_path, suffix, encoding):
    escaped = '\\"000\\u0030\\u00303"' if suffix == "tsv" else KEYS[3]
    rows = [("key", "q"), (escaped, "1.5"), (KEYS[7], ""), (KEYS[9], "2")]
    text = "".join(("\t" if suffix == "tsv" else ",").join(row) + "\r\n" for row in rows)
    (tmp_path / f"q.{suffix}").write_text(text, encoding=encoding, newline="")
    found = score(small_catalog, "q", file=str(tmp_path / f"q.{suffix}"))
    assert [found[3], found[9]] == [1.5, 2.0]
    assert np.isnan(found).sum() == 598


def test_image_and_text_of_different_models_are_refused(small_catalog, tmp_path, make_embeddings, make_vectors):
    import_pool([str(make_embeddings(tmp_path / "text", make_vectors(KEYS), column="text"))], small_catalog.folder)
    with pytest.raises(
        UserError, match="image embeddings have 16 dimensions and text embeddings 8: a clip-score needs both"
    ):
        score(small_catalog, "clip-score")
