import io

import numpy as np
import pytest
from PIL import Image

from tailwise.encoders import pixels
from tailwise.errors import UserError
from tailwise.stages.embed import embed
from tailwise.stages.import_pool import import_pool


@pytest.fixture
def catalog(tmp_path, make_tar, make_image):
    """Five good images, two bad ones, in two shards."""
    grey = io.BytesIO()
    Image.new("L", (3, 5), 77).save(grey, "PNG")
    shards = [
        [("a", make_image(1)), ("b", b"not an image"), ("c", make_image(2)), ("d", grey.getvalue())],
        [("e", make_image(3)[:100]), ("f", make_image(4)), ("g", make_image(5))],
    ]
    for number, samples in enumerate(shards):
        members = [member for key, image in samples for member in ((f"{key}.jpg", image), (f"{key}.txt", key.encode()))]
        make_tar(tmp_path / "pool" / f"{number:05d}.tar", members)
    return import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog


def test_each_row_is_the_description_of_its_image(catalog, make_image, rejected_counts):
    report = embed(catalog, "pixels", workers=1)
    assert (report.embedded, report.lacking) == (5, 7)
    rows = catalog.embedding("image", catalog.parts()[0])
    for row, seed in ((0, 1), (2, 2), (5, 4), (6, 5)):
        image = Image.open(io.BytesIO(make_image(seed))).convert("RGB")
        np.testing.assert_allclose(rows[row], pixels.describe([image])[0], atol=1e-3)
    assert not rows[[1, 4]].any()
    assert dict(report.rejections.counts) == {("embed", "unreadable image"): 2} == rejected_counts(catalog)
    assert catalog.rejected()["key"].to_pylist() == ["b", "e"]


def test_workers_and_chunks_change_nothing(catalog, tmp_path, tree_bytes, monkeypatch):
    other = import_pool([str(tmp_path / "pool")], tmp_path / "other", workers=1).catalog
    embed(catalog, "pixels", workers=1)
    monkeypatch.setattr("tailwise.stages.embed.CHUNK_IMAGES", 2)
    embed(other, "pixels", workers=2)
    assert tree_bytes(catalog.folder / "embeddings") == tree_bytes(other.folder / "embeddings")


def test_a_rerun_embeds_only_what_is_new(catalog, tmp_path, make_pool):
    embed(catalog, "pixels", workers=1)
    path = catalog.embedding_folder("image") / "part-000000.npy"
    before = path.stat().st_mtime_ns
    assert embed(catalog, "pixels", workers=1).lacking == 0
    make_pool(tmp_path / "more", [4], first_shard=8)
    import_pool([str(tmp_path / "more")], catalog.folder, workers=1)
    report = embed(catalog, "pixels", workers=1)
    assert (report.embedded, report.lacking) == (4, 4)
    assert path.stat().st_mtime_ns == before


def test_mistakes(catalog, tmp_path, small_catalog):
    with pytest.raises(UserError, match="unknown encoder 'clip': use pixels"):
        embed(catalog, "clip")
    with pytest.raises(UserError, match="encoders can't be mixed"):
        embed(small_catalog, "pixels")
    (tmp_path / "pool" / "00001.tar").rename(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"00001.tar can't be read .*tailwise relocate"):
        embed(catalog, "pixels", workers=2)


def test_a_pool_without_one_good_image_is_an_error(tmp_path, make_tar):
    make_tar(tmp_path / "pool" / "0.tar", [("a.jpg", b"x"), ("a.txt", b"a")])
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    with pytest.raises(UserError, match="not one of 1 images could be read"):
        embed(catalog, "pixels", workers=1)
