"""Each damage of a tar is told by each check that can see it; remote tars are looked at as local ones are."""

import shutil

import fsspec
import pytest

from tailwise.errors import UserError
from tailwise.loader.shards import CHECKS, Damage, check_shards
from tailwise.stages.import_pool import import_pool


@pytest.fixture
def pool(tmp_path, make_pool):
    make_pool(tmp_path / "pool", [5, 6, 7])
    return tmp_path / "pool"


@pytest.fixture
def catalog(pool, tmp_path):
    return import_pool([str(pool)], tmp_path / "catalog", workers=1).catalog


def damage_of(catalog, check):
    return check_shards(catalog, catalog.snapshot(), check, workers=2)


@pytest.mark.parametrize("check", CHECKS)
def test_sound_tars(catalog, check):
    assert damage_of(catalog, check) == []


def missing(path):
    path.unlink()


def shorter(path):
    path.write_bytes(path.read_bytes()[:-512])


def other_members(path):
    path.write_bytes(path.read_bytes().replace(b"000010002.txt", b"000010002.xyz"))


def unreadable(path):
    path.unlink()
    path.mkdir()


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
        (other_members, "other members", {"index"}),
        (renamed_in_header, "other members", {"index"}),
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
    memory.rm("/checked/00002.tar")
    for check in ("size", "index"):
        assert check_shards(catalog, catalog.snapshot(), check, workers=1) == [Damage(2, url, "missing")]
    memory.rm("/checked", recursive=True)


def test_unknown_check(catalog):
    with pytest.raises(UserError, match="none, size, index"):
        damage_of(catalog, "sizes")
