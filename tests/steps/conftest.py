"""Captions, a pool that has them, and a list of entries."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.files import note_digest
from tailwise.steps.importing.pool import import_pool

WORDS = ["cat", "cat", "cat", "dog", "red cat", "Zürich", "日本", "a", "of", "U.S.", "rare"]


@pytest.fixture(scope="module")
def captions():
    random = np.random.default_rng(5)
    made = [" ".join(random.choice(WORDS, random.integers(1, 6))) for _ in range(170)]
    return ["", ",", "cat, dog!", *made]


@pytest.fixture
def captioned(tmp_path, captions, make_tar, make_image):
    """173 samples with these captions, in 3 shards and 2 parts; row groups of 32."""
    image = make_image()
    for shard, start in enumerate((0, 60, 120)):
        members = [
            member
            for row, caption in enumerate(captions[start : start + 60], start)
            for member in ((f"{row:05d}.jpg", image), (f"{row:05d}.txt", caption.encode()))
        ]
        make_tar(tmp_path / "pool" / f"{shard:05d}.tar", members)
    made = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=100).catalog
    for part in made.parts():
        pq.write_table(made.samples(part), made.samples_path(part.number), row_group_size=32)
        note_digest(made.samples_path(part.number))
    return made


@pytest.fixture
def entries(tmp_path):
    path = tmp_path / "entries.txt"
    path.write_text("cat\nred cat\n\n  dog \r\ncat\nred\n日本\nZürich\nrare\nU . S .\nU.S.\nabsent\n   \n")
    return path


@pytest.fixture(scope="session")
def listed():
    """What `entries` holds."""
    return ["cat", "red cat", "dog", "red", "日本", "Zürich", "rare", "U . S .", "U.S.", "absent"]


@pytest.fixture(scope="session")
def matched(listed):
    """The entries of a caption by MetaCLIP's rule, in plain Python."""

    def find(caption):
        text = f" {caption} "
        for mark in ",.;:?!`":
            text = text.replace(mark, f" {mark} ")
        return [entry for entry in listed if f" {entry} " in text]

    return find
