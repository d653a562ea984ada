import shutil

import pytest

from tailwise.catalog.layout import LOCK
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.upkeep.relocate import relocate
from tailwise.storage.local import locked


@pytest.fixture
def catalog(tmp_path, make_pool):
    make_pool(tmp_path / "a", [3, 3])
    make_pool(tmp_path / "b", [3, 3], first_shard=2)
    return import_pool([tmp_path / "a", tmp_path / "b"], tmp_path / "catalog", workers=1).catalog


def paths(catalog):
    return catalog.shards().column("path").to_pylist()


def refused(catalog, old, new, match):
    before = paths(catalog)
    with pytest.raises(UserError, match=match):
        relocate(catalog, str(old), str(new))
    assert paths(catalog) == before


def test_moved_tars_are_found_again(catalog, tmp_path):
    (tmp_path / "a").rename(tmp_path / "c")
    assert relocate(catalog, str(tmp_path / "a"), str(tmp_path / "c")) == 2
    assert paths(catalog)[:2] == [f"{tmp_path}/c/00000.tar", f"{tmp_path}/c/00001.tar"]


@pytest.mark.parametrize("link", [False, True])
def test_onto_tars_of_the_same_catalog(catalog, tmp_path, link):
    target = tmp_path / "b"
    (target / "00002.tar").rename(target / "00000.tar")
    (target / "00000.tar").rename(target / "00002.tar")
    if link:
        target = tmp_path / "link"
        target.symlink_to(tmp_path / "b")
    refused(catalog, tmp_path / "a" / "00000.tar", target / "00002.tar", "two shards of the catalog would both be")


def test_to_a_folder_that_lacks_them(catalog, tmp_path):
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "00001.tar").unlink()
    refused(catalog, tmp_path / "a", tmp_path / "c", r"1 of 2 shards .*c/00001.tar is missing")


def test_to_a_folder_with_tars_of_another_size(catalog, tmp_path, make_pool):
    make_pool(tmp_path / "c", [3, 9])
    refused(catalog, tmp_path / "a", tmp_path / "c", r"00001.tar is [\d,]+ bytes; ")


def test_to_a_folder_with_other_tars_of_the_same_size(catalog, tmp_path):
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    for number in (0, 1):
        path = tmp_path / "c" / f"{number:05d}.tar"
        content = bytearray(path.read_bytes())
        assert len(content) == (tmp_path / "b" / f"{number + 2:05d}.tar").stat().st_size
        path.write_bytes((tmp_path / "b" / f"{number + 2:05d}.tar").read_bytes())
    refused(catalog, tmp_path / "a", tmp_path / "c", "2 of 2 shards .* other content")


def test_while_another_process_writes_the_catalog(catalog, tmp_path):
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with locked(catalog.folder / LOCK, "it"):
        refused(catalog, tmp_path / "a", tmp_path / "c", "another process is writing")
