"""Each damage of a tar is told by each check that can see it; remote tars are looked at as local ones are."""

import shutil

import fsspec
import pytest

from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.shards.ranges import open_store
from tailwise.shards.verify import CHECKS, Damage, check_shards
from tailwise.steps.importing.pool import import_pool


@pytest.fixture
def pool(tmp_path, make_pool):
    make_pool(tmp_path / "pool", [5, 6, 7])
    return tmp_path / "pool"


@pytest.fixture
def catalog(pool, tmp_path):
    return import_pool([str(pool)], tmp_path / "catalog", workers=1).catalog


def damage_of(catalog, check, workers=1):
    return check_shards(catalog, catalog.snapshot(), check, workers=workers)


@pytest.mark.parametrize("check", CHECKS)
def test_sound_tars(catalog, check):
    assert damage_of(catalog, check) == damage_of(catalog, check, workers=2) == []


def missing(path):
    path.unlink()


def shorter(path):
    path.write_bytes(path.read_bytes()[:-512])


def other_members(path):
    path.write_bytes(path.read_bytes().replace(b"000010002.txt", b"000010002.xyz"))


def unreadable(path):
    path.unlink()
    path.mkdir()


def other_caption(path):
    """Names, offsets and sizes stay."""
    path.write_bytes(path.read_bytes().replace(b"caption of 000010002", b"caption of 000010003"))


def renamed_in_header(path):
    """Valid checksum, same size, other name."""
    content = bytearray(path.read_bytes())
    content[0:1], content[1:2] = b"1", b"/"  # '0' → '1' and '0' → '/': the sum of the header's bytes stays
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason", "seen_by"),
    [
        (missing, "missing", {"size", "index"}),
        (shorter, "when it was imported", {"size", "index"}),
        (unreadable, "unreadable: IsADirectoryError", {"size", "index"}),
        (other_members, "other", {"size", "index"}),
        (renamed_in_header, "other", {"size", "index"}),
        (other_caption, "other content", {"size", "index"}),
    ],
)
def test_damage(catalog, pool, harm, reason, seen_by):
    path = pool / "00001.tar"
    harm(path)
    for check in CHECKS:
        found = damage_of(catalog, check)
        if check in seen_by:
            assert [(item.shard, item.path) for item in found] == [(1, str(path))]
            assert reason in found[0].reason
        else:
            assert found == []


@pytest.mark.parametrize("check", ["size", "index"])
def test_workers_find_the_same(catalog, pool, check):
    missing(pool / "00000.tar")
    other_caption(pool / "00001.tar")
    shorter(pool / "00002.tar")
    found = damage_of(catalog, check)
    assert [item.shard for item in found] == [0, 1, 2]
    assert damage_of(catalog, check, workers=2) == found


def test_without_fingerprints_lengths_and_members_are_compared(catalog, pool, forget_fingerprints):
    forget_fingerprints(catalog)
    older = Catalog.open(catalog.folder)
    assert older.shards().column("fingerprint").null_count == 3
    other_caption(pool / "00001.tar")
    assert damage_of(older, "size") == damage_of(older, "index") == []
    renamed_in_header(pool / "00001.tar")
    assert damage_of(older, "size") == []
    assert [item.shard for item in damage_of(older, "index")] == [1]


def test_a_change_behind_the_first_block_is_seen_by_the_index_check_and_when_the_tar_is_opened(tmp_path, make_tar):
    members = [item for key in "ab" for item in ((f"{key}.jpg", bytes(100_000)), (f"{key}.txt", key.encode()))]
    path = make_tar(tmp_path / "pool" / "0.tar", members)
    catalog = import_pool([str(path)], tmp_path / "catalog", workers=1).catalog
    path.write_bytes(path.read_bytes().replace(b"b" + bytes(511), b"x" + bytes(511)))
    assert damage_of(catalog, "size") == []
    assert [item.reason for item in damage_of(catalog, "index")] == ["other content than when it was imported"]
    table = catalog.shards()
    store = open_store([str(path)], tmp_path / "cache", 10**6, fingerprints=table.column("fingerprint").to_pylist())
    for _ in range(2):  # once found, it is not read again
        with pytest.raises(OSError, match="other content than when it was imported"):
            store.read(0, 512, 600)
    assert open_store([str(path)], tmp_path / "cache", 10**6).read(0, 512, 600) == bytes(88)


def test_remote_tars(pool, tmp_path):
    memory = fsspec.filesystem("memory")
    shutil.copytree(pool, tmp_path / "copy")
    for path in pool.glob("*.tar"):
        memory.pipe(f"/checked/{path.name}", path.read_bytes())
    catalog = import_pool(["memory://checked/"], tmp_path / "remote", workers=1).catalog
    assert check_shards(catalog, catalog.snapshot(), "size") == []
    assert check_shards(catalog, catalog.snapshot(), "index", workers=1) == []
    url = catalog.shards().column("path").to_pylist()[2]
    memory.pipe("/checked/00002.tar", b"short")
    assert check_shards(catalog, catalog.snapshot(), "size")[0].reason.startswith("5 bytes;")
    memory.pipe(
        "/checked/00002.tar",
        (pool / "00002.tar").read_bytes().replace(b"caption of 000020003", b"caption of 000020004"),
    )
    for check in ("size", "index"):
        assert check_shards(catalog, catalog.snapshot(), check, workers=1)[0].reason.startswith("other content")
    names = ("path", "index_checksum", "size_bytes", "fingerprint")
    columns = (catalog.shards().column(name).to_pylist() for name in names)
    paths, versions, sizes, fingerprints = columns
    store = open_store(paths, tmp_path / "cache", 10**6, versions, sizes, fingerprints)
    assert store.read(0, 0, 9) == b"000000000"
    with pytest.raises(OSError, match="other content than when it was imported"):
        store.read(2, 0, 9)
    memory.rm("/checked/00002.tar")
    for check in ("size", "index"):
        assert check_shards(catalog, catalog.snapshot(), check, workers=1) == [Damage(2, url, "missing")]
    memory.rm("/checked", recursive=True)


def test_unknown_check(catalog):
    with pytest.raises(UserError, match="did you mean 'size'"):
        damage_of(catalog, "sizes")
