"""The contract of containers: each row of the table gives back the samples that were put in, and notices what changed.

A new container needs one entry in `writers`.
"""

import io
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tailwise.catalog.schema import NO_OFFSET, SHARD_SCHEMA
from tailwise.errors import UnsupportedError
from tailwise.shards.containers import (
    CONTAINERS,
    FOLDER,
    IMAGES,
    METADATA,
    WEBDATASET,
    container_of,
    containers_of,
    index_shard,
    with_bytes,
    without_bytes,
)
from tailwise.shards.decode import decode_rgb
from tailwise.shards.fingerprint import EVERY, ChangedShardError, compare_shard
from tailwise.shards.locations import LOCATION
from tailwise.shards.ranges import open_store, read_samples
from tailwise.shards.verify import CHECKS, check_shards
from tailwise.steps.importing.pool import import_pool

ALL = list(CONTAINERS.values())
WITH_BYTES = [container for container in ALL if container.has_bytes]
ONE_FILE = [container for container in WITH_BYTES if container is not FOLDER]
WITHOUT_BYTES = [container for container in ALL if not container.has_bytes]
CAPTIONS = ["", "a cat", "Ein Gemälde — 猫", "two\nlines", "x" * 5000, "a dog", "b", "c"]
TARGET = "cls"


def by_name(container):
    return next(name for name, other in CONTAINERS.items() if other is container)


@pytest.fixture(scope="module")
def samples(make_image):
    """Key → encoded image and caption; images of several formats and sizes, no two alike."""
    kinds = ["JPEG", "PNG", "WEBP", "JPEG"] * 2
    images = [
        make_image(seed, kind, side) for seed, (kind, side) in enumerate(zip(kinds, range(8, 136, 16), strict=True))
    ]
    return {f"{at:032x}": pair for at, pair in enumerate(zip(images, CAPTIONS, strict=True))}


@pytest.fixture(scope="module")
def write(make_tar):
    """`write(container, path, samples, targets={})` writes a file of this container."""

    def members_of(samples, targets):
        members = []
        for key, (image, caption) in samples.items():
            kind = Image.open(io.BytesIO(image)).format
            members += [(f"{key}.{'jpg' if kind == 'JPEG' else kind.lower()}", image), (f"{key}.txt", caption.encode())]
            members += [(f"{key}.{TARGET}", targets[key])] if key in targets else []
        return members

    def tar(path, samples, targets):
        make_tar(path, members_of(samples, targets))

    def folder(path, samples, targets):
        path.mkdir()
        for name, content in members_of(samples, targets):
            (path / name).write_bytes(content)

    def metadata(path, samples, targets):
        pq.write_table(pa.table({"uid": list(samples), "text": [caption for _, caption in samples.values()]}), path)

    def images(path, samples, targets):
        encoded = [{"bytes": image, "path": None} for image, _ in samples.values()]
        columns = {"key": list(samples), "image": encoded, "caption": [caption for _, caption in samples.values()]}
        columns |= {TARGET: [targets.get(key) for key in samples]} if targets else {}
        pq.write_table(pa.table(columns), path, row_group_size=3, compression="none", use_dictionary=False)

    writers = {WEBDATASET: tar, IMAGES: images, FOLDER: folder, METADATA: metadata}
    assert {*writers} == {*ALL}

    def run(container, path, samples, targets=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[container](path, samples, targets or {})
        return f"{path}/" if container is FOLDER else str(path)

    return run


@pytest.fixture
def path(request, tmp_path, write, samples):
    """A file of the container that the test is for."""
    container = request.node.callspec.params["container"]
    return write(container, tmp_path / "pool" / f"0{container.suffix}".rstrip("/"), samples)


def locations_of(table):
    places = np.zeros(table.num_rows, LOCATION)
    for name in LOCATION.names:
        places[name] = table.column(name).to_numpy()
    return places


def read(path, content, folder, table=None, **store):
    """Pixels and caption of each sample of an index, or of a table of some, through a store."""
    found = open_store([path], folder / "cache", 10**8, ["1"], [content.size_bytes], **store, parquet=[content.parquet])
    table = content.samples if table is None else table
    shards = np.zeros(table.num_rows, np.int32)
    contents = read_samples(found, shards, locations_of(table))
    found.close()
    return [(np.asarray(decode_rgb(image)).tolist(), caption.decode()) for image, caption in contents]


def put_in(samples):
    return [
        (np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).tolist(), caption)
        for image, caption in samples.values()
    ]


def remote_copy(path):
    url = f"memory://{Path(path).parents[1].name}/{Path(path).name}"
    fsspec.filesystem("memory").pipe(url.removeprefix("memory:/"), Path(path).read_bytes())
    return url


def places(path, samples):
    """Where in a file each image begins."""
    whole = Path(path).read_bytes()
    return [whole.index(image) + len(image) // 2 for image, _ in samples.values()]


@pytest.mark.parametrize("container", ALL, ids=by_name)
def test_each_is_found_by_its_name_and_its_columns(container, path):
    assert container_of(path) is container
    assert container_of("/pool/named_otherwise") is WEBDATASET


@pytest.mark.parametrize("container", ALL, ids=by_name)
def test_the_index_has_all_samples_in_order(container, path, samples, tmp_path):
    content = index_shard(path)
    assert content.samples.column("key").to_pylist() == list(samples)
    assert content.samples.column("caption").to_pylist() == CAPTIONS
    assert content.rejected.num_rows == 0
    files = Path(path).iterdir() if container is FOLDER else [Path(path)]
    assert content.size_bytes == sum(file.stat().st_size for file in files)
    catalog = import_pool([path], tmp_path / "catalog", workers=1).catalog
    (shard,) = catalog.shards().to_pylist()
    assert (shard["path"], shard["size_bytes"]) == (path, content.size_bytes)
    assert (shard["index_checksum"], shard["fingerprint"]) == (content.index_checksum, content.fingerprint)


@pytest.mark.parametrize("container", WITH_BYTES, ids=by_name)
def test_ranges_decode_to_the_pixels_and_captions_that_were_put_in(container, path, samples, tmp_path):
    content = index_shard(path)
    assert read(path, content, tmp_path, fingerprints=[content.fingerprint]) == put_in(samples)
    backwards = content.samples.take(list(reversed(range(len(samples)))))
    assert read(path, content, tmp_path, backwards) == put_in(samples)[::-1]


@pytest.mark.parametrize("container", ONE_FILE, ids=by_name)
def test_a_remote_file_gives_the_same(container, path, samples, tmp_path):
    url, here = remote_copy(path), index_shard(path)
    there = index_shard(url)
    assert there.samples.equals(here.samples)
    assert (there.index_checksum, there.fingerprint) == (here.index_checksum, here.fingerprint)
    assert container.checksum(url) == container.checksum(path)
    assert read(url, there, tmp_path) == put_in(samples)


@pytest.mark.parametrize("container", WITH_BYTES, ids=by_name)
def test_the_checksum_is_that_of_the_index(container, path, samples, write, tmp_path):
    content = index_shard(path)
    assert container.checksum(path) == (content.size_bytes, content.index_checksum)
    keys = list(samples)
    swapped = {key: samples[other] for key, other in zip(keys, [*keys[1:], keys[0]], strict=True)}
    other = write(container, tmp_path / f"other{container.suffix}", swapped)
    assert container.checksum(other)[1] != content.index_checksum
    with pytest.raises(FileNotFoundError):
        container.checksum(str(tmp_path / f"absent{container.suffix}"))


@pytest.mark.parametrize("container", ONE_FILE, ids=by_name)
def test_a_changed_file_is_noticed(container, path, samples, tmp_path):
    """By its fingerprint, by each check and by the store; the index stays as it was."""
    catalog = import_pool([path], tmp_path / "catalog", workers=1).catalog
    content, whole = index_shard(path), bytearray(Path(path).read_bytes())
    assert all(check_shards(catalog, catalog.snapshot(), check, workers=1) == [] for check in CHECKS)
    compare_shard(path, content.fingerprint, EVERY)
    for place in places(path, samples):
        changed = bytearray(whole)
        changed[place] ^= 1
        Path(path).write_bytes(changed)
        with pytest.raises(ChangedShardError, match="other content"):
            compare_shard(path, content.fingerprint, EVERY)
        with pytest.raises(ChangedShardError):
            noted = {"fingerprints": [content.fingerprint], "parquet": [content.parquet]}
            open_store([path], tmp_path / "cache", 1, ["1"], [content.size_bytes], **noted).read(0, 0, 1)
        (damage,) = check_shards(catalog, catalog.snapshot(), "index", workers=1)
        assert damage.reason == "other content than when it was imported"


@pytest.mark.parametrize("container", ONE_FILE, ids=by_name)
def test_a_truncated_file_gives_whole_samples_and_a_reason(container, path, samples, tmp_path):
    catalog = import_pool([path], tmp_path / "catalog", workers=1).catalog
    whole, expected = Path(path).read_bytes(), dict(zip(samples, put_in(samples), strict=True))
    for end in [0, 1, *places(path, samples)]:
        Path(path).write_bytes(whole[:end])
        content = container.index(path)
        keys = content.samples.column("key").to_pylist()
        assert len(keys) < len(samples)
        assert content.rejected.num_rows
        assert not keys or read(path, content, tmp_path) == [expected[key] for key in keys]
        for check in ("size", "index"):
            (damage,) = check_shards(catalog, catalog.snapshot(), check, workers=1)
            assert (
                f"{end:,} bytes; {len(whole):,} when it was imported" in damage.reason or "unreadable" in damage.reason
            )


@pytest.mark.parametrize("container", WITH_BYTES, ids=by_name)
def test_pairs_are_images_and_targets(container, samples, write, tmp_path):
    targets = {key: str(at).encode() for at, key in enumerate(samples) if at != 3}
    path = write(container, tmp_path / f"set{container.suffix}", samples, targets)
    expected = [(image, (targets[key],) if key in targets else None) for key, (image, _) in samples.items()]
    assert list(container.pairs(path, (TARGET,))) == expected
    if container in ONE_FILE:
        assert list(container.pairs(remote_copy(path), (TARGET,))) == expected


@pytest.mark.parametrize("container", WITHOUT_BYTES, ids=by_name)
def test_samples_without_bytes_are_refused_in_one_way(container, path, samples, tmp_path):
    content = index_shard(path)
    assert content.fingerprint is None
    assert {NO_OFFSET} == {*content.samples.column("image_offset").to_pylist()}
    for ask in (lambda: container.checksum(path), lambda: container.pairs(path, (TARGET,))):
        with pytest.raises(
            UnsupportedError, match=f"{len(samples)} samples in 1 .* have no images, .*{path}: download"
        ):
            ask()
    catalog = import_pool([path], tmp_path / "catalog", workers=1).catalog
    assert check_shards(catalog, catalog.snapshot(), "index", workers=1) == []


def test_shards_are_split_by_what_they_hold():
    rows = [
        {"shard": at, "path": f"{at}{container.suffix}", "part": 0, "rows": 1, "size_bytes": 1, "index_checksum": ""}
        | {"parquet": {"image": "jpg", "caption": None, "groups": []} if container is IMAGES else None}
        for at, container in enumerate(ALL)
    ]
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)
    assert containers_of(table) == ALL
    assert [path[1:] for path in with_bytes(table)["path"].to_pylist()] == [
        container.suffix for container in WITH_BYTES
    ]
    assert with_bytes(table).num_rows + without_bytes(table).num_rows == len(CONTAINERS)
    assert with_bytes(table.slice(0, 0)).num_rows == 0
