import io
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tailwise.encoders import pixels
from tailwise.errors import ConflictError, UserError
from tailwise.requests import ClusterRequest, DedupRequest, EmbedRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.dedup.dedup import dedup
from tailwise.steps.embedding.embed import embed
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify
from tailwise.steps.upkeep.why import why

ANY_SHARE = EmbedRequest(encoder="", max_rejected=1)


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
    report = embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    assert (report.embedded, report.lacking) == (5, 7)
    rows = catalog.embedding("image", catalog.parts()[0])
    for row, seed in ((0, 1), (2, 2), (5, 4), (6, 5)):
        image = Image.open(io.BytesIO(make_image(seed))).convert("RGB")
        np.testing.assert_allclose(rows[row], pixels.describe([image])[0], atol=1e-3)
    assert not rows[[1, 4]].any()
    counts = {("embed", "not an image"): 1, ("embed", "unreadable image"): 1}
    assert dict(report.rejections.counts) == counts == rejected_counts(catalog)
    assert catalog.rejected()["key"].to_pylist() == ["b", "e"]


def test_batches_change_nothing(catalog, tmp_path, tree_bytes):
    other = import_pool([str(tmp_path / "pool")], tmp_path / "other", workers=1).catalog
    embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    embed(other, EmbedRequest(encoder="pixels", batch_size=2, max_rejected=1, workers=1))
    assert tree_bytes(catalog.folder / "embeddings") == tree_bytes(other.folder / "embeddings")


@pytest.mark.parametrize("workers", [1, 2])
def test_items_and_readers_change_nothing(tmp_path, make_pool, tree_bytes, monkeypatch, workers):
    """Batches are read ahead into the next items, of which an item may be the last batch of a shard."""
    make_pool(tmp_path / "pool", [10, 3, 7, 1])
    made = [import_pool([str(tmp_path / "pool")], tmp_path / name, workers=1, part_rows=12).catalog for name in "ab"]
    embed(made[0], EmbedRequest(encoder="pixels", batch_size=2, workers=1))
    monkeypatch.setattr("tailwise.steps.embedding.column.ITEM_BATCHES", 2)
    monkeypatch.setattr("tailwise.steps.embedding.column.WINDOW", 3)  # too short for the readers: they start again
    embed(made[1], EmbedRequest(encoder="pixels", batch_size=2, workers=workers))
    assert tree_bytes(made[0].folder / "embeddings") == tree_bytes(made[1].folder / "embeddings")


def test_devices_share_the_shards_and_change_nothing(catalog, tmp_path, tree_bytes, monkeypatch):
    other = import_pool([str(tmp_path / "pool")], tmp_path / "other", workers=1).catalog
    embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    monkeypatch.setattr("tailwise.devices.find_devices", lambda _: [torch.device("cpu")] * 2)
    (tmp_path / "pool" / "00001.tar").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"00001.tar can't be read .*tailwise relocate"):  # as the second one says
        embed(other, replace(ANY_SHARE, encoder="pixels", workers=1))
    (tmp_path / "gone").rename(tmp_path / "pool" / "00001.tar")
    embed(other, replace(ANY_SHARE, encoder="pixels", workers=1))
    assert tree_bytes(catalog.folder / "embeddings") == tree_bytes(other.folder / "embeddings")


def test_a_rerun_embeds_only_what_is_new(catalog, tmp_path, make_pool):
    embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    path = catalog.embedding_folder("image") / "part-000000.npy"
    before = path.stat().st_mtime_ns
    assert embed(catalog, EmbedRequest(encoder="pixels", workers=1)).lacking == 0
    make_pool(tmp_path / "more", [4], first_shard=8)
    import_pool([str(tmp_path / "more")], catalog.folder, workers=1)
    report = embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    assert (report.embedded, report.lacking) == (4, 4)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip", EmbedRequest(encoder=""), "unknown encoder 'clip': use .*pixels, or import"),
        ("pixels", EmbedRequest(encoder="", column="text"), "pixels has no text side: give `column` image"),
        ("pixels", EmbedRequest(encoder="", column="both"), "pixels has no text side"),
        ("pixels", EmbedRequest(encoder="", column="dino"), "`column` 'dino' is new: say with `of` image or text"),
        ("pixels", EmbedRequest(encoder="", column="dino", of="audio"), "`of` 'audio': use image or text"),
        ("pixels", EmbedRequest(encoder="", column="text", of="image"), "`of` image: column 'text' is of text"),
        ("pixels", EmbedRequest(encoder="", column="both", of="image"), "`of` does nothing with `column` both"),
        ("pixels", EmbedRequest(encoder="", column="../x", of="image"), "can't name an artifact"),
        ("pixels", EmbedRequest(encoder="", max_rejected=10), "`max_rejected` 10: must lie between 0 and 1"),
        ("pixels", EmbedRequest(encoder="", device="tpu"), "`device` 'tpu' cannot be used"),
        ("pixels", EmbedRequest(encoder="", device="meta"), "`device` 'meta' cannot be used"),
    ],
)
def test_mistakes(catalog, tree_bytes, name, options, message):
    with pytest.raises(UserError, match=message):
        embed(catalog, replace(options, encoder=name, workers=1))
    assert not (catalog.folder / "embeddings").exists()


def test_shards_that_are_gone_or_shorter_than_they_were(catalog, tmp_path, small_catalog):
    with pytest.raises(UserError, match="encoders can't be mixed"):
        embed(small_catalog, EmbedRequest(encoder="pixels", workers=1))
    path = tmp_path / "pool" / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:1500])
    with pytest.raises(UserError, match=r"00001.tar can't be read \(it has 1,500 bytes; [\d,]+ when it was"):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    path.unlink()
    with pytest.raises(UserError, match=r"00001.tar can't be read .*tailwise relocate"):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    path.write_bytes(content)
    assert (
        embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1)).columns[0].samples == 3
    )  # the first shard was finished


def test_what_another_encoder_left_unfinished_is_not_taken(catalog, tmp_path):
    (tmp_path / "pool" / "00001.tar").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="can't be read"):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    unfinished = catalog.embedding_folder("image") / "unfinished"
    (made_by,) = unfinished.iterdir()
    assert [path.name for path in sorted(made_by.iterdir())] == [
        "shard-00000000-00000000.json",
        "shard-00000000-00000000.npy",
    ]
    made_by.rename(unfinished / "of-another-encoder")
    (tmp_path / "gone").rename(tmp_path / "pool" / "00001.tar")
    assert embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1)).columns[0].samples == 7
    assert not unfinished.exists()


def test_a_finished_shard_that_was_damaged(catalog, tmp_path):
    (tmp_path / "pool" / "00001.tar").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="can't be read"):
        embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    (tmp_path / "gone").rename(tmp_path / "pool" / "00001.tar")
    (rows,) = catalog.embedding_folder("image").glob("unfinished/*/*.npy")
    rows.write_bytes(rows.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard-00000000-00000000.npy is damaged .*: delete .*unfinished, then repeat"):
        embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    shutil.rmtree(catalog.embedding_folder("image") / "unfinished")
    assert embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1)).embedded == 5


def test_members_that_lie_far_apart_are_read_one_by_one(tmp_path, make_tar, make_image, rejected_counts):
    """Shards whose images are a small part of them."""
    filler = bytes(50_000)
    members = [
        member
        for key in range(4)
        for member in ((f"{key}.jpg", make_image(key)), (f"{key}.txt", b"a"), (f"{key}.bin", filler))
    ]
    make_tar(tmp_path / "pool" / "0.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    embed(catalog, EmbedRequest(encoder="pixels", workers=1))
    images = [Image.open(io.BytesIO(make_image(key))).convert("RGB") for key in range(4)]
    rows = catalog.embedding("image", catalog.parts()[0])
    np.testing.assert_allclose(rows, pixels.describe(images), atol=1e-3)


def test_a_part_of_several_row_groups(tmp_path, make_pool, monkeypatch):
    monkeypatch.setattr("tailwise.catalog.files.ROW_GROUP_ROWS", 7)
    make_pool(tmp_path / "pool", [10, 9, 3])
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=19).catalog
    assert [part.rows for part in catalog.parts()] == [19, 3]
    assert pq.ParquetFile(catalog.samples_path(0)).num_row_groups > 2
    assert embed(catalog, EmbedRequest(encoder="pixels", batch_size=4, workers=1)).embedded == 22


@pytest.mark.parametrize("workers", [1, 2])
def test_a_replaced_tar_of_the_same_length_is_refused(catalog, tmp_path, make_image, workers):
    path = tmp_path / "pool" / "00001.tar"
    content, image = path.read_bytes(), make_image(4)
    other = image[:-3] + bytes([image[-3] ^ 1]) + image[-2:]
    path.write_bytes(content.replace(image, other))
    assert path.stat().st_size == len(content)
    with pytest.raises(UserError, match=r"00001\.tar can't be read .*other content than when it was imported"):
        embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=workers))
    path.write_bytes(content)
    assert embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=workers)).embedded == 5


def test_a_pool_has_several_columns_of_images(catalog):
    """A second column, of a name of its own, is as the first, and serves the same commands."""
    embed(catalog, replace(ANY_SHARE, encoder="pixels", workers=1))
    embed(catalog, replace(ANY_SHARE, encoder="pixels", column="again", of="image", workers=1))
    assert (
        embed(catalog, replace(ANY_SHARE, encoder="pixels", column="again", workers=1)).lacking == 0
    )  # its modality is known
    first, second = (catalog.embedding_parts(name, catalog.snapshot()) for name in ("image", "again"))
    assert all(np.array_equal(*parts) for parts in zip(first, second, strict=True))
    with pytest.raises(ConflictError, match="`of` text: column 'again' is of image; name another column"):
        embed(catalog, replace(ANY_SHARE, encoder="pixels", column="again", of="text"))
    made = [cluster(catalog, ClusterRequest(k=2, column=name, name=name)) for name in ("image", "again")]
    assert made[0].table.equals(made[1].table)
    assert made[1].column == "again"
    dropped = dedup(catalog, DedupRequest(epsilon=0.01, clustering="again"))
    assert dropped.summary["judged"] == made[1].summary["samples"]
    assert [item["column"] for item in status(catalog)["embeddings"]] == ["again", "image"]
    told = why(catalog, catalog.samples(catalog.parts()[0], ["key"]).column(0)[0].as_py())["samples"][0]
    assert told["embeddings"] == {"image": True, "text": False, "again": True}
    assert verify(catalog)[1] == []
    with pytest.raises(UserError, match="unknown column 'agian': did you mean 'again'"):
        cluster(catalog, ClusterRequest(k=2, column="agian", name="x"))
