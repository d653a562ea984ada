"""The decoded pool: images and captions are those that were imported, or decoding stops."""

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from tailwise.compare.images import decoded_pool
from tailwise.errors import UserError
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.upkeep.remove import remove

SIDE = 8


def resize(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1) / 255


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([list(caption.rjust(4).encode()[-4:]) for caption in captions])


def decode(catalog, folder):
    options = {"size": SIDE, "resize": resize, "tokenizer": tokenize, "about": "a test"}
    return decoded_pool(catalog, catalog.snapshot(), folder, **options)


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
    assert bytes(found.tokens[4].astype(np.uint8)) == b"0001"


def test_postscript_is_no_image_and_starts_no_program(tmp_path, make_tar, make_image, postscript):
    content, started = postscript
    members = [("a.jpg", make_image(1)), ("a.txt", b"good"), ("b.jpg", content), ("b.txt", b"evil")]
    make_tar(tmp_path / "pool" / "0.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    assert decode(catalog, tmp_path / "decoded").readable.tolist() == [True, False]
    assert not started.exists()
