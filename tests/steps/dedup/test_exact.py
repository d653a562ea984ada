"""Exact duplicates by hashes: what a dictionary of the images finds, in any size of pieces."""

import csv
import io
import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tailwise.catalog.drops import DropList
from tailwise.errors import UserError
from tailwise.requests import ClusterRequest, DedupRequest, FilterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup import exact, hashes
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.scoring.filter import filter_samples
from tailwise.steps.upkeep.why import why


def encoded(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def catalog(tmp_path, make_tar, make_image):
    """Eight samples in three shards and two parts: the same file, the same pixels in another file, and images that cannot be decoded."""
    jpeg, png = make_image(1), encoded(Image.open(io.BytesIO(make_image(1))).convert("RGB"), "PNG")
    turned = encoded(Image.open(io.BytesIO(png)).resize((4, 16)), "PNG")
    images = [[make_image(2), jpeg, b"broken"], [png, jpeg, turned], [b"broken", png]]
    names = itertools.count()
    for shard, content in enumerate(images):
        samples = [(f"{next(names)}", image) for image in content]
        members = [each for key, image in samples for each in ((f"{key}.jpg", image), (f"{key}.txt", b"x" * int(key)))]
        make_tar(tmp_path / "pool" / f"{shard}.tar", members)
    return import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=5).catalog


def kept_rows(catalog, name):
    table = DropList(catalog, name).tables(slice(0, catalog.snapshot().rows))
    return dict(zip(table["row"].to_pylist(), table["kept_row"].to_pylist(), strict=True))


def test_identical_files_and_pixels(catalog):
    made = dedup(catalog, DedupRequest(exact="bytes"))
    assert kept_rows(catalog, "identical") == {4: 1, 6: 2, 7: 3}
    assert (made.summary["judged"], made.summary["not_decoded"], made.summary["dropped"]) == (8, 0, 3)
    made = dedup(catalog, DedupRequest(exact="pixels", name="pixels"))
    assert kept_rows(catalog, "pixels") == {3: 1, 4: 1, 7: 1}
    assert made.summary["not_decoded"] == 2
    assert pq.read_table(made.table)["reason"].to_pylist() == ["identical pixels"] * 3
    assert why(catalog, "7")["samples"][0]["drop_lists"][1]["kept_key"] == "1"
    assert dedup(catalog, DedupRequest(exact="pixels", name="pixels")).summary == made.summary


def test_the_first_in_the_order_stays_and_left_out_samples_take_no_part(catalog):
    dedup(catalog, DedupRequest(exact="pixels", order="score", score="caption-characters", name="longest"))
    assert kept_rows(catalog, "longest") == {1: 7, 3: 7, 4: 7}
    filter_samples(catalog, FilterRequest("caption-characters", minimum=2, name="long"))
    dedup(catalog, DedupRequest(exact="pixels", without=["long"], name="rest"))
    assert kept_rows(catalog, "rest") == {4: 3, 7: 3}
    kept = set()
    for seed in range(8):
        dedup(catalog, DedupRequest(exact="pixels", order="random", seed=seed, name=f"random{seed}"))
        kept.update(kept_rows(catalog, f"random{seed}").values())
    assert kept == {1, 3, 4, 7}
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.5, without=["longest"]))
    assert not set(np.flatnonzero(plan.draw(0))) & {1, 3, 4}


def test_buckets_change_nothing(small_catalog, monkeypatch):
    """600 samples with 12 different images: 588 are dropped, each for the first of its group."""
    dedup(small_catalog, DedupRequest(exact="bytes"))
    found = kept_rows(small_catalog, "identical")
    captions = [each for part in small_catalog.parts() for each in small_catalog.samples(part)["caption"].to_pylist()]
    first = {caption: row for row, caption in reversed([*enumerate(captions)])}
    assert found == {row: first[caption] for row, caption in enumerate(captions) if row != first[caption]}
    monkeypatch.setattr(exact, "BUCKET_ROWS", 50)
    dedup(small_catalog, DedupRequest(exact="bytes", name="again"))
    assert kept_rows(small_catalog, "again") == found


def test_an_interrupted_command_goes_on_with_the_next_part(catalog, interrupted, watched):
    with interrupted(hashes, "read_batches", lambda _folder, _modality, _hash, items, *_, **__: items[0].part == 1):
        dedup(catalog, DedupRequest(exact="bytes"))
    with watched(hashes, "read_batches") as calls:
        dedup(catalog, DedupRequest(exact="bytes"))
        dedup(catalog, DedupRequest(exact="bytes", order="random", name="random"))
    assert [call[3][0].part for call in calls] == [1]
    assert kept_rows(catalog, "identical") == {4: 1, 6: 2, 7: 3}


def test_a_pool_without_images(tmp_path, make_metadata):
    make_metadata(tmp_path / "metadata", "x", [f"{number:032x}" for number in range(3)])
    catalog = import_pool([str(tmp_path / "metadata")], tmp_path / "catalog", workers=1).catalog
    with pytest.raises(UserError, match=r"3 samples in 1 file.* have no images.*; or compare embeddings"):
        dedup(catalog, DedupRequest(exact="pixels"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": "pixel"}, "`exact` 'pixel': did you mean 'pixels'"),
        ({"exact": "bytes", "order": "farthest"}, "`order` 'farthest': with `exact`, use random or score"),
        ({"exact": "bytes", "order": "score"}, "need each other"),
        ({"exact": "bytes", "epsilon": 0.1}, "`epsilon` does nothing with `exact`"),
        ({"mirrored": True, "epsilon": 0.1}, "`mirrored` does nothing without `against`"),
    ],
)
def test_what_is_refused(catalog, options, message):
    with pytest.raises(UserError, match=message):
        dedup(catalog, DedupRequest(**options))


def test_a_list_of_hashes_is_not_extended(small_catalog):
    dedup(small_catalog, DedupRequest(exact="bytes"))
    cluster(small_catalog, ClusterRequest(k=3))
    with pytest.raises(UserError, match="not of dedup inside clusters"):
        dedup(small_catalog, DedupRequest(epsilon=0.1, extends="identical"))


def test_files_of_a_real_pool_that_are_known_to_be_identical(shared_data, tmp_path, make_tar):
    """All rows of fashion-lt that have a twin, and two thousand others: those that the truth lists are dropped, and no other."""
    with (shared_data / "fashion-lt" / "truth.tsv").open(encoding="utf-8", newline="") as stream:
        truth = {
            row["key"]: row["duplicate_of"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        }
    twins = {key: of for key, of in truth.items() if of}
    assert len(twins) == 778
    chosen = {*twins, *twins.values(), *[*truth][::21]}
    table = pq.read_table(shared_data / "fashion-lt" / "train.parquet", columns=["key", "image"])
    images = zip(table["key"].to_pylist(), table["image"].combine_chunks().field("bytes").to_pylist(), strict=True)
    images = [(key, image) for key, image in images if key in chosen]  # in the order of the truth
    for shard, start in enumerate(range(0, len(images), 1000)):
        samples = images[start : start + 1000]
        members = [each for key, image in samples for each in ((f"{key}.jpg", image), (f"{key}.txt", b"caption"))]
        make_tar(tmp_path / "pool" / f"{shard}.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    for of in ("bytes", "pixels"):
        dedup(catalog, DedupRequest(exact=of, name=of))
        keys = [images[row][0] for row in kept_rows(catalog, of)]
        assert (set(twins) <= set(keys)) and (of == "pixels" or set(keys) == set(twins))
