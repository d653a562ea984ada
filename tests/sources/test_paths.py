"""Names that tell the tar: parted, and matched to a catalog's shards by the longest common end."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.execution.keys import ABSENT, AMBIGUOUS
from tailwise.steps.importing.rows import dotted_key, homes, in_folder, in_tar, match_tars


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/data/laion/00012.tar/000120001.jpg", ("/data/laion/00012.tar", "000120001")),
        ("00012.tar/000120001.jpg", ("00012.tar", "000120001")),
        ("00012.tar/000120001", ("00012.tar", "000120001")),
        ("s3://bucket/a/00012.tar/k.tar.webp", ("s3://bucket/a/00012.tar", "k")),
        ("a.tar/b.tar/c.jpg", ("a.tar/b.tar", "c")),
        ("a.tar/deep/er/key.jpg", ("a.tar", "deep/er/key")),
        ("000120001", None),
        ("folder/000120001.jpg", None),
        ("a.tar", None),
        ("", None),
    ],
)
def test_names_in_tars(name, place):
    assert in_tar(name) == place


@pytest.mark.parametrize(
    ("name", "place"),
    [("laion/00012/k.jpg", ("laion/00012", "k")), ("00012/k", ("00012", "k")), ("k.jpg", None), ("", None)],
)
def test_names_in_folders(name, place):
    assert in_folder(name) == place


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("x/0.tar/photo.0001.jpg", "photo.0001"),
        ("x/0.tar/photo.jpg", "photo"),
        ("x/0.tar/photo", "photo"),
        ("x/0.tar/v1.2/photo", "v1.2/photo"),
        ("x/0/a.b.c.jpg", "a.b.c"),
    ],
)
def test_longer_keys_of_dotted_names(name, key):
    place = in_tar(name) or in_folder(name)
    assert dotted_key(name, place) == key


def test_homes_of_names_each_once():
    names = pa.array(["a/0.tar/x.jpg", "a/0.tar/y.jpg", None, "plain", "b/0/x.jpg", "c.tar/d/e.jpg"])
    assert homes(names) == ["a/0.tar", "b/0", "c.tar"]
    assert homes(pa.array([], pa.string())) == []


def matched(paths, *asked, preferred=None):
    found = match_tars(asked, paths, preferred)
    return [found.get(home, ABSENT) for home in asked]


def test_the_longest_common_end_decides():
    paths = ["/new/a/x/0.tar", "/new/b/x/0.tar", "/new/b/x/1.tar"]
    assert matched(paths, "/old/a/x/0.tar", "/old/b/x/0.tar") == [0, 1]
    assert matched(paths, "x/0.tar") == [AMBIGUOUS]
    assert matched(paths, "/elsewhere/1.tar") == [2]
    assert matched(paths, "/elsewhere/2.tar") == [ABSENT]


def test_where_several_fit_equally_the_given_ones_win():
    paths = ["/a/0.tar", "/b/0.tar", "/c/0.tar"]
    assert matched(paths, "0.tar", preferred=frozenset([1])) == [1]
    assert matched(paths, "0.tar", preferred=frozenset([1, 2])) == [AMBIGUOUS]
    assert matched(paths, "a/0.tar", preferred=frozenset([1])) == [0]


def test_two_names_are_never_one_tar():
    """The tar of `b` was not imported: what lies in it must not be taken for what lies in that of `a`."""
    assert matched(["/new/a/0.tar"], "/old/a/0.tar", "/old/b/0.tar") == [0, ABSENT]
    assert matched(["/new/c/0.tar"], "/old/a/0.tar", "/old/b/0.tar") == [AMBIGUOUS, AMBIGUOUS]


def test_folders_and_schemes():
    assert matched(["s3://bucket/pool/00012.tar"], "pool/00012") == [0]
    assert matched(["/pool/00012.tar"], "s3://bucket/pool/./00012.tar") == [0]
    assert matched(["/pool/00012.parquet"], "pool/00012") == [ABSENT]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_unmoved_tars_are_themselves(folders):
    paths = [f"/{'/'.join(folder)}/0.tar" for folder in folders]
    assert matched(paths, *paths) == list(range(len(paths)))
