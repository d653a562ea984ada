"""Steps on columns of embeddings that the user names: the same as on the columns that need no name."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.drops import DropList
from tailwise.errors import UserError
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest, ScoreRequest, SourceRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.scoring.scores import score_parts

KEYS = [f"{shard:05d}{sample:04d}" for shard in range(2) for sample in range(20)]
LACKING = 7  # row without an embedding of images by CLIP


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory, make_pool):
    """A catalog whose columns are DINO's images, and CLIP's images and texts; and one of CLIP's alone, under their plain names."""
    folder = tmp_path_factory.mktemp("columns")
    make_pool(folder / "pool", [20, 20])
    random = np.random.default_rng(5)
    images = random.normal(size=(40, 8))
    images[25] = images[3] + 0.01 * random.normal(size=8)
    images[LACKING + 1] = images[LACKING]
    dino, texts = random.normal(size=(40, 6)), images + random.normal(size=(40, 8))
    named, plain = (import_pool([str(folder / "pool")], folder / name).catalog for name in ("named", "plain"))
    keys = np.array(KEYS)
    has = np.arange(40) != LACKING
    for catalog, column, of, rows, vectors in (
        (named, "image", None, keys, dino),
        (named, "clip", "image", keys[has], images[has]),
        (named, "clip.text", "text", keys, texts),
        (plain, "image", None, keys[has], images[has]),
        (plain, "text", None, keys, texts),
    ):
        path = folder / f"{column}.parquet"
        pq.write_table(pa.table({"key": rows, "embedding": list(vectors.astype(np.float32))}), path)
        import_pool([str(path)], catalog.folder, options=SourceRequest(column=column, of=of), max_rejected=1.0)
    return named, plain


@pytest.mark.parametrize(
    ("name", "options"),
    [("clip-score", {}), ("cliploss", {"batch_size": 10, "repetitions": 2}), ("normsim", {"target": "plain"})],
)
def test_scores_of_named_columns(catalogs, name, options):
    named, plain = catalogs
    if "target" in options:
        options = {"target": str(plain.folder)}
    columns = {"image": "clip"} if name == "normsim" else {"image": "clip", "text": "clip.text"}

    def scores(catalog, **more):
        request = ScoreRequest(name, {**options, **more})
        return np.concatenate(list(score_parts(catalog, catalog.snapshot(), request)))

    assert np.array_equal(scores(named, **columns), scores(plain), equal_nan=True)
    assert np.isnan(scores(plain)[LACKING])
    with pytest.raises(UserError, match="no text embeddings" if name != "normsim" else "holds float16"):
        scores(named)


def test_dedup_compares_another_column_than_the_clusters(catalogs):
    named, plain = catalogs
    for catalog in catalogs:
        cluster(catalog, ClusterRequest(k=1))
    for rule in ("greedy", "any-earlier"):
        lists = [
            dedup(catalog, DedupRequest(epsilon=0.01, rule=rule, order="random", column=column, name=rule))
            for catalog, column in ((named, "clip"), (plain, None))
        ]
        rows = [
            DropList(catalog, made.name).tables(slice(0, 40)) for catalog, made in zip(catalogs, lists, strict=True)
        ]
        assert rows[0].equals(rows[1])
        assert set(rows[0]["row"].to_pylist()) <= {3, 25}
        assert rows[0].num_rows == 1
    cluster(named, ClusterRequest(k=4, name="four"))
    made = dedup(named, DedupRequest(epsilon=0.01, column="clip", clustering="four", probe=4, name="wide"))
    assert set(DropList(named, made.name).tables(slice(0, 40))["row"].to_pylist()) <= {3, 25}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda catalog: filter_samples(catalog, FilterRequest("clip-score", minimum=0.1, image="clpi")),
            "unknown column 'clpi'.*clip",
        ),
        (
            lambda catalog: filter_samples(catalog, FilterRequest("clip-score", minimum=0.1, image="clip.text")),
            "column 'clip.text' is of text, not of image",
        ),
        (
            lambda catalog: filter_samples(catalog, FilterRequest("width", minimum=1, image="clip")),
            "`image` does nothing with the score 'width'",
        ),
        (lambda catalog: dedup(catalog, DedupRequest(epsilon=0.1, column="clop")), "unknown column 'clop'"),
    ],
)
def test_columns_that_do_not_fit_are_refused(catalogs, use, message):
    cluster(catalogs[0], ClusterRequest(k=1))
    with pytest.raises(UserError, match=message):
        use(catalogs[0])
