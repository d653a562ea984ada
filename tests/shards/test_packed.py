"""Compressed tars: import and embed read them as if they were unpacked; what reads at random refuses them, until they are."""

import bz2
import gzip
import lzma

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from tailwise import Loader, PlanRequest, import_pool, make_plan
from tailwise.encoders.encoder import Inputs
from tailwise.errors import DamagedError, UserError
from tailwise.shards import packed
from tailwise.shards.verify import check_shards
from tailwise.shards.webdataset import read_shard
from tailwise.sources import find
from tailwise.steps.embedding.read import ShardRows, read_batches
from tailwise.steps.upkeep.unpack import unpack

SIZES = (7, 5)


def by_arrow(codec):
    return lambda content: pa.compress(content, codec, asbytes=True)


PACK = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar.zst": by_arrow("zstd"),
    ".tar.lz4": by_arrow("lz4"),
}


@pytest.fixture
def tars(tmp_path, make_pool, make_image, make_tar):
    """Plain tars whose images differ, and a JSON between image and caption."""
    made = []
    for shard, size in enumerate(SIZES):
        members = [
            member
            for key in (f"{shard:05d}{number:04d}" for number in range(size))
            for member in (
                (f"{key}.jpg", make_image(seed=int(key))), (f"{key}.json", b'{"width": 3}'), (f"{key}.txt", key.encode())
            )
        ]  # fmt: skip
        made.append(make_tar(tmp_path / "plain" / f"{shard:05d}.tar", members))
    return made


def compress(tars, ending=".tar.gz"):
    """The folder with the compressed tars."""
    folder = tars[0].parents[1] / "packed"
    folder.mkdir(exist_ok=True)
    for tar in tars:
        (folder / tar.name.replace(".tar", ending)).write_bytes(PACK[ending](tar.read_bytes()))
    return folder


@pytest.mark.parametrize("ending", PACK)
def test_the_samples_are_those_of_the_plain_tar(tars, ending):
    folder = compress(tars, ending)
    for tar in tars:
        path = folder / tar.name.replace(".tar", ending)
        found, plain = read_shard(str(path)), read_shard(str(tar))
        assert found.samples == plain.samples and found.samples.num_rows
        assert (found.index_checksum, found.rejected.num_rows) == (plain.index_checksum, 0)
        assert found.size_bytes == path.stat().st_size


@pytest.mark.parametrize("ending", PACK)
def test_files_of_several_frames_are_read_to_the_end(tars, ending):
    """So pigz, pzstd and `cat` write them."""
    content, path = tars[0].read_bytes(), tars[0].with_name(f"x{ending}")
    path.write_bytes(b"".join(PACK[ending](content[at : at + 5000]) for at in range(0, len(content), 5000)))
    assert read_shard(str(path)).samples == read_shard(str(tars[0])).samples


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"])
@pytest.mark.parametrize("harm", ["cut", "changed", "other"])
def test_damaged_files_give_nothing_and_a_reason(tars, ending, harm):
    content = bytearray(PACK[ending](tars[0].read_bytes()))
    path = tars[0].with_name(f"x{ending}")
    if harm == "cut":
        del content[len(content) // 2 :]
    elif harm == "changed":  # zstd checks its content only if its writer wished so
        content[0 if ending == ".tar.zst" else len(content) // 2] ^= 0xFF
    else:
        content[:] = b"<html>sign in</html>"
    path.write_bytes(content)
    found = read_shard(str(path))
    assert found.samples.num_rows == 0
    (row,) = found.rejected.to_pylist()
    assert row["reason"] == ("not a tar" if found.size_bytes else "unreadable tar")
    assert bool(found.size_bytes) == (harm == "other" or (harm, ending) == ("changed", ".tar.zst"))


def test_what_unpacks_to_too_much_is_refused(tars, monkeypatch):
    path = tars[0].with_name("bomb.tar.gz")
    path.write_bytes(gzip.compress(bytes(10**6)))
    monkeypatch.setattr(packed, "ALWAYS_BYTES", 10**5)
    (row,) = read_shard(str(path)).rejected.to_pylist()
    assert row["reason"] == "unreadable tar" and "unpacks to more than 100,000 bytes" in row["detail"]
    monkeypatch.setattr(packed, "FREE_BYTES", 1 << 62)
    assert "there is room for" in read_shard(str(path)).rejected.to_pylist()[0]["detail"]


def images(catalog):
    """What an encoder gets of all rows."""
    seen = []

    def prepare(items):
        seen.extend(items)
        return Inputs({}, {})

    shards = [ShardRows(shard, 0, sum(SIZES[:shard]), size) for shard, size in enumerate(SIZES)]
    for _ in read_batches(catalog.folder, "image", prepare, shards, 3, workers=1):
        pass
    return seen


def batches(plan):
    loader = Loader(plan, batch_size=4, lanes=1)
    try:
        return [(batch.images, batch.texts, batch.rows.tolist()) for batch in loader.epoch(0)]
    finally:
        loader.close()


def test_from_import_to_training(tars, tmp_path):
    plain = import_pool(tars[0].parent, tmp_path / "here", workers=1).catalog
    folder = compress(tars)
    catalog = import_pool(folder, tmp_path / "there", workers=1).catalog
    assert images(catalog) == images(plain) and len(images(plain)) == sum(SIZES)
    assert check_shards(catalog, catalog.snapshot(), "index", workers=1) == []
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.8))
    with pytest.raises(UserError, match=r"2 tars are compressed, .*00000\.tar\.gz.*`tailwise unpack \S+there …`"):
        Loader(plan, batch_size=4)
    assert unpack(catalog, tmp_path / "unpacked") == 2
    assert batches(plan) == batches(make_plan(plain, "p", PlanRequest("random", keep=0.8)))
    assert check_shards(catalog, catalog.snapshot(), "index", workers=1) == []
    assert unpack(catalog, tmp_path / "other") == 0 and not (tmp_path / "other").exists()
    assert import_pool(folder, tmp_path / "there", workers=1).new_samples == 0
    for tar in tars:
        assert (tmp_path / "unpacked" / tar.name).read_bytes() == tar.read_bytes()


def test_remote_tars_are_read_and_unpacked_too(tars, tmp_path):
    store = fsspec.filesystem("memory")
    for tar in tars:
        store.pipe(f"/packed/{tar.name}.gz", gzip.compress(tar.read_bytes()))
    catalog = import_pool("memory://packed/{00000..00001}.tar.gz", tmp_path / "there", workers=1).catalog
    plain = import_pool(tars[0].parent, tmp_path / "here", workers=1).catalog
    assert images(catalog) == images(plain)
    assert unpack(catalog, tmp_path / "unpacked") == 2
    for tar in tars:
        assert (tmp_path / "unpacked" / tar.name).read_bytes() == tar.read_bytes()
    store.rm("/packed", recursive=True)


def test_an_interrupted_unpacking_is_resumed(tars, tmp_path):
    catalog = import_pool(compress(tars, ".tgz"), tmp_path / "catalog", workers=1).catalog
    before = catalog.shards()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(tars[0].read_bytes())
    (tmp_path / "out" / "00001.tar").write_bytes(b"half")
    stamp = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    assert unpack(catalog, tmp_path / "out") == 2
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == stamp
    assert (tmp_path / "out" / "00001.tar").read_bytes() == tars[1].read_bytes()
    assert catalog.shards()["index_checksum"] == before["index_checksum"]


def test_a_tar_that_changed_is_not_unpacked(tars, tmp_path):
    folder = compress(tars)
    catalog = import_pool(folder, tmp_path / "catalog", workers=1).catalog
    (folder / "00001.tar.gz").write_bytes((folder / "00000.tar.gz").read_bytes())
    with pytest.raises(DamagedError, match=r"00001\.tar\.gz can't be unpacked \(.*other content"):
        unpack(catalog, tmp_path / "out")
    assert catalog.shards()["path"].to_pylist()[0].endswith("00000.tar.gz")


def test_which_tars_are_found(tars):
    folder = compress(tars)
    (folder / "00000.tar").write_bytes(tars[0].read_bytes())
    (folder / "x.tar.Z").touch()
    (folder / "00000.parquet").write_bytes(b"a sidecar")
    found = find([str(folder)])
    assert [*found.tars] == [str(folder / "00000.tar"), str(folder / "00001.tar.gz")]
    reasons = {item.path.rsplit("/", 1)[1]: item.reason for item in found.left_out}
    assert reasons == {"00000.tar.gz": "compressed tar beside the unpacked one", "x.tar.Z": "compressed tar"}
    joined = find(["::".join(str(folder / f"0000{number}.tar.gz") for number in range(2))])
    assert [*joined.tars] == [str(folder / f"0000{number}.tar.gz") for number in range(2)]
    assert [*find([f"{folder}/{{00000..00001}}.tar.gz"]).tars] == [*joined.tars]


def test_ranges_are_of_the_unpacked_tar(tars):
    offsets = read_shard(str(compress(tars) / "00000.tar.gz")).samples["image_offset"].to_numpy()
    assert (np.diff(offsets) > 0).all() and tars[0].read_bytes()[offsets[3] :][:2] == b"\xff\xd8"
