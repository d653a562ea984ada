"""The decoded pool: images and captions are those that were imported, or decoding stops."""

import pickle

import fsspec
import pytest

from tailwise.compare.images import decoded_pool
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.upkeep.remove import remove


def decode(catalog, folder):
    return decoded_pool(catalog, catalog.snapshot(), folder)


@pytest.fixture(params=["local", "remote"])
def pool(request, make_pool, tmp_path):
    """A catalog of two tars, and functions that read and write one of them."""
    paths = list(make_pool(tmp_path / "pool", [3, 3]))
    if request.param == "local":
        catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
        yield catalog, paths[1].read_bytes, paths[1].write_bytes
        return
    memory = fsspec.filesystem("memory")
    for path in paths:
        memory.pipe(f"/decoded/{path.name}", path.read_bytes())
    catalog = import_pool(["memory://decoded/"], tmp_path / "catalog", workers=1).catalog
    yield catalog, paths[1].read_bytes, lambda content: memory.pipe("/decoded/00001.tar", content)
    memory.rm("/decoded", recursive=True)


def test_a_tar_replaced_by_another_of_the_same_length_is_refused(pool, tmp_path):
    catalog, read, write = pool
    assert decode(catalog, tmp_path / "good").readable.all()
    write(read().replace(b"caption of 000010002", b"caption of 000010009"))
    with pytest.raises(UserError, match=r"row 3 can't be read .*other content than when it was imported"):
        decode(catalog, tmp_path / "bad")


def test_a_tar_whose_removed_sample_was_wiped_is_decoded(pool, tmp_path):
    catalog, read, write = pool
    (tmp_path / "keys.txt").write_text("000010002\n")
    remove(catalog, tmp_path / "keys.txt")
    write(read().replace(b"caption of 000010002", bytes(20)))
    found = decode(catalog, tmp_path / "decoded")
    assert found.readable.tolist() == [True] * 5 + [False]
    assert found.of(4)[1] == b"caption of 000010001"
    assert found.of(5) is None
    again = pickle.loads(pickle.dumps(found))
    assert (again.of(0)[0] == found.of(0)[0]).all()
    assert len(pickle.dumps(found)) < 1000


def test_postscript_is_no_image_and_starts_no_program(tmp_path, make_tar, make_image, postscript):
    content, started = postscript
    members = [("a.jpg", make_image(1)), ("a.txt", b"good"), ("b.jpg", content), ("b.txt", b"evil")]
    make_tar(tmp_path / "pool" / "0.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    assert decode(catalog, tmp_path / "decoded").readable.tolist() == [True, False]
    assert not started.exists()
