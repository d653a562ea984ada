"""Parquet files with images: what an import takes of them, and that all readers get the bytes that tars of the same samples give."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import to_tensor

from tailwise import EmbedRequest, Loader, PlanRequest, import_pool, make_plan
from tailwise.errors import UserError
from tailwise.evaluate.sets import find_set
from tailwise.shards.content import ParquetLayout
from tailwise.shards.fingerprint import comparable_shards
from tailwise.shards.locations import Locations, ensure_locations
from tailwise.shards.parquet_images import GROUP_BYTES, RowGroups, image_columns, joined_bytes, read_images
from tailwise.shards.parquet_shards import ParquetShards
from tailwise.shards.ranges import open_shards, sample_ranges
from tailwise.steps.embedding.embed import embed

IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
SIZES = (60, 45, 75, 20)


def write(path, images, captions, group=16, image_type=IMAGE, name="image", **more):
    """A Parquet file as `datasets` writes it, of encoded images (or None) and captions."""
    values = [{"bytes": image, "path": None} for image in images] if image_type == IMAGE else images
    columns = {name: pa.array(values, image_type), "caption": pa.array(captions, more.pop("text", pa.string())), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group, compression="zstd")
    return path


@pytest.fixture(scope="module")
def pools(tmp_path_factory, make_tar, make_image):
    """The same samples as tars and as Parquet files: (folder of tars, folder of Parquet files)."""
    folder = tmp_path_factory.mktemp("pools")
    for shard, size in enumerate(SIZES):
        keys = [f"{shard:05d}{number:04d}" for number in range(size)]
        images = [make_image(seed=int(key), kind="PNG" if number % 3 else "JPEG") for number, key in enumerate(keys)]
        kinds = ["png" if number % 3 else "jpg" for number in range(size)]
        captions = [f"caption of {key}" for key in keys]
        rows = list(zip(keys, kinds, images, captions, strict=True))
        members = [
            pair
            for key, kind, image, text in rows
            for pair in ((f"{key}.{kind}", image), (f"{key}.txt", text.encode()))
        ]
        make_tar(folder / "tars" / f"{shard:05d}.tar", members)
        write(folder / "parquet" / f"{shard:05d}.parquet", images, captions, key=keys)
    return folder / "tars", folder / "parquet"


def planned(source, folder):
    return make_plan(import_pool([str(source)], folder, workers=1).catalog, "p", PlanRequest("random", keep=0.5))


def batches(plan, cache, workers=0, **options):
    loader = Loader(plan, batch_size=16, lanes=4, transform=to_tensor, workers=workers, cache_folder=cache, **options)
    found = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    loader.close()
    return found


def same_batches(left, right):
    assert len(left) == len(right) > 10
    return all(
        torch.equal(one.images, other.images) and torch.equal(one.rows, other.rows) and one.texts == other.texts
        for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("block", [8192, 8])
def test_batches_are_those_of_tars(pools, tmp_path, workers, block):
    tars, parquet = (planned(source, tmp_path / source.name) for source in pools)
    wanted = batches(tars, tmp_path / "cache", block=block)
    assert same_batches(wanted, batches(parquet, tmp_path / "cache", workers, block=block))


def test_row_groups_are_decoded_once_for_all_ranges_that_are_announced(pools, tmp_path, wait_until):
    catalog = import_pool([str(pools[1])], tmp_path / "catalog", workers=1).catalog
    ensure_locations(catalog, catalog.snapshot())
    rows = np.arange(sum(SIZES))
    shards = np.repeat(np.arange(len(SIZES)), SIZES).astype(np.int32)
    ranges = sample_ranges(shards, Locations(catalog, catalog.snapshot()).of(rows))[0]
    store = open_shards(comparable_shards(catalog), tmp_path / "cache", 10**8)
    store.want(ranges[::3])
    wait_until(lambda: not store._own.prefetching)
    assert not any(isinstance(content, OSError) for content in store.read_many(ranges[::3]))
    assert store.statistics["requests"] == sum(-(-size // 16) for size in SIZES)


def test_embeddings_are_those_of_tars(pools, tmp_path):
    rows = []
    for source in pools:
        catalog = import_pool([str(source)], tmp_path / source.name, workers=1).catalog
        embed(catalog, EmbedRequest(encoder="pixels", batch_size=7, workers=1))
        rows.append(np.array(catalog.embedding("image", catalog.parts()[0])))
    assert np.array_equal(*rows) and rows[0].any()


def test_exported_shards_hold_the_same_samples(pools, tmp_path, run_tailwise):
    members = []
    for source in pools:
        planned(source, tmp_path / source.name)
        out = tmp_path / f"{source.name}-out"
        run_tailwise("export", tmp_path / source.name, "p", "--to", "shards", "--output", out, "--epoch", 0)
        members.append((out / "00000000.tar").read_bytes())
        assert pq.read_table(out / "00000000.parquet").num_rows == sum(SIZES) // 2
    assert members[0] == members[1]


def test_commands_name_the_row_group_and_check_the_file(pools, tmp_path, run_tailwise):
    planned(pools[1], tmp_path / "catalog")
    assert "row group 1" in run_tailwise("why", tmp_path / "catalog", "000000016").stdout
    run_tailwise("verify", tmp_path / "catalog")


def test_a_changed_file_is_refused_by_each_reader(pools, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in sorted(pools[1].iterdir()):
        (copies / path.name).write_bytes(path.read_bytes())
    plan = planned(copies, tmp_path / "catalog")
    content = bytearray((copies / "00002.parquet").read_bytes())
    content[300] ^= 1
    (copies / "00002.parquet").write_bytes(content)
    with pytest.raises(UserError, match="other content than when it was imported"):
        batches(plan, tmp_path / "cache", check="size")
    with pytest.raises(UserError, match=r"00002.parquet can't be read \(.*other content"):
        embed(plan.catalog, EmbedRequest(encoder="pixels", workers=1))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.none() | st.binary(max_size=9), st.none() | st.text(max_size=5)), min_size=1, max_size=20
    ),
    group=st.integers(1, 7),
    kind=st.sampled_from([IMAGE, pa.binary(), pa.large_binary()]),
    text=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
)
def test_each_sample_is_a_range(tmp_path_factory, rows, group, kind, text):
    folder = tmp_path_factory.mktemp("x")
    path = write(folder / "a.parquet", [row[0] for row in rows], [row[1] for row in rows], group, kind, text=text)
    content = read_images(str(path))
    layout = content.parquet
    assert layout is not None and len(layout["groups"]) == -(-len(rows) // group)
    samples = content.samples.to_pylist()
    good = [at for at, (image, caption) in enumerate(rows) if image and caption is not None]
    assert [sample["key"] for sample in samples] == [f"{at:09d}" for at in good]
    store = ParquetShards(
        [str(path)], folder / "cache", 1 << 30, ["v"], [content.size_bytes], [content.fingerprint], [layout]
    )
    for at, sample in zip(good, samples, strict=True):
        for name, wanted in (("image", rows[at][0]), ("caption", rows[at][1].encode())):
            start = sample[f"{name}_offset"]
            assert start // GROUP_BYTES == at // group
            assert store.read(0, start, start + sample[f"{name}_bytes"]) == wanted
    reasons = [item["reason"] for item in content.rejected.to_pylist()]
    assert len(samples) + len(reasons) == len(rows) and {*reasons} <= {"no image", "no caption"}


def test_rows_that_cannot_be_used_are_listed(tmp_path, make_image):
    image = make_image()
    given_images = [image, None, image, image, image, image, image]
    captions = [b"one", b"two", None, b"\xff", b"x" * 1_000_001, b"six", b"seven"]
    keys = ["a", "b", "c", "d", "e", "a", "f"]
    status = ["success"] * 6 + ["failed_to_download"]
    path = write(
        *(tmp_path / "00000.parquet", given_images, captions),
        image_type=pa.binary(),
        name="jpg",
        text=pa.binary(),
        key=keys,
        status=status,
        width=[8] * 7,
        clip=[0.5] * 7,
    )
    content = read_images(str(path))
    (sample,) = content.samples.to_pylist()
    assert (sample["key"], sample["width"], sample["clip"], sample["image_extension"]) == ("a", 8, 0.5, "jpg")
    reasons = {item["key"]: item["reason"] for item in content.rejected.to_pylist()}
    assert reasons == {
        "b": "no image",
        "c": "no caption",
        "d": "caption is not UTF-8",
        "e": "caption is too long",
        "a": "duplicate key",
    }


def test_columns_are_guessed_or_chosen(tmp_path, make_image, run_tailwise):
    schema = pa.schema({"picture": IMAGE, "Words": pa.string(), "text": pa.string()})
    assert image_columns(schema) == ("picture.bytes", "picture.path", "text", None)
    assert image_columns(pa.schema({"uid": pa.string(), "text": pa.string()})) is None
    assert image_columns(pa.schema({"Image": pa.binary(), "TEXT": pa.string()})) == ("Image", None, "TEXT", None)
    assert image_columns(pa.schema({"image": pa.string(), "text": pa.string()})) is None  # a path, or base 64
    rows = pa.table(
        {"picture": pa.array([{"bytes": make_image(), "path": "a.jpg"}], IMAGE), "Words": ["chosen"], "text": ["usual"]}
    )
    pq.write_table(rows, tmp_path / "a.parquet")
    catalog = import_pool([str(tmp_path / "a.parquet")], tmp_path / "one", workers=1).catalog
    assert catalog.samples(catalog.parts()[0], ["caption"])["caption"].to_pylist() == ["usual"]
    run_tailwise("import", tmp_path / "a.parquet", tmp_path / "two", "--caption", "words", "--image", "picture")
    plan = make_plan(type(catalog).open(tmp_path / "two"), "p", PlanRequest("random", keep=1))
    assert [
        text for batch in Loader(plan, batch_size=1, cache_folder=tmp_path / "c").epoch(0) for text in batch.texts
    ] == ["chosen"]


def test_images_by_path_alone_are_no_images(tmp_path):
    rows = pa.table({"image": pa.array([{"bytes": None, "path": "images/1.jpg"}], IMAGE), "caption": ["one"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no image: 1"):
        import_pool([str(tmp_path / "a.parquet")], tmp_path / "catalog", workers=1)


def test_a_row_group_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tailwise.shards.parquet_images.MOST_GROUP_BYTES", 1 << 20)
    path = write(tmp_path / "a.parquet", [bytes(1 << 16)] * 100, ["x"] * 100, group=100)
    assert path.stat().st_size < 10_000
    (reason,) = read_images(str(path)).rejected.to_pylist()
    assert "6,553" in reason["detail"] and "smaller row groups" in reason["detail"]


def test_sets_of_parquet_files_are_evaluated_as_those_of_tars(tmp_path, make_image, make_tar):
    labels = [0, 2, None]
    images = [make_image(seed) for seed in range(3)]
    members = [(f"{at}.jpg", image) for at, image in enumerate(images)] + [("0.cls", b"0"), ("1.cls", b"2")]
    make_tar(tmp_path / "tars" / "0.tar", members)
    (tmp_path / "tars" / "classnames.txt").write_text("a\nb\nc\n")
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": pa.array([{"bytes": image, "path": None} for image in images], IMAGE), "label": labels})
    (tmp_path / "files").mkdir()
    pq.write_table(table.replace_schema_metadata(noted), tmp_path / "files" / "test.parquet")
    sets = [find_set(str(tmp_path / name)) for name in ("tars", "files")]
    assert sets[0].classes == sets[1].classes == ("a", "b", "c")
    found = [sorted(pair for shard in each.shards for pair in shard.samples() if pair[1]) for each in sets]
    assert found[0] == found[1] and len(found[0]) == 2


def test_joined_bytes_of_nothing():
    none = pa.array([], pa.large_binary())
    assert joined_bytes(none, none) == b""


def test_a_footer_is_read_once(pools):
    path = pools[1] / "00000.parquet"
    layout = ParquetLayout(image="image.bytes", caption="caption", groups=[0, 0, 0, 0])
    groups = RowGroups(str(path), path.stat().st_size, layout)
    assert 0 < groups.stored_bytes(0) < path.stat().st_size
    with pytest.raises(OSError, match="other content"):
        groups.content(0)
