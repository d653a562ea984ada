"""Finding tars and embeddings in what a user names."""

import fsspec
import pytest

from tailwise.errors import UserError
from tailwise.sources import SOURCES, find


@pytest.fixture
def pool(tmp_path, make_pool):
    return [str(path) for path in make_pool(tmp_path / "pool", [1, 1, 1])]


def names(sources, **options):
    return list(find([str(source) for source in sources], **options).tars)


def test_folder_gives_its_tars_by_name_with_their_sizes(tmp_path, pool):
    (tmp_path / "pool" / "notes.txt").touch()
    (tmp_path / "pool" / "folder.tar").mkdir()
    found = find([str(tmp_path / "pool")]).tars
    assert list(found) == pool
    assert all(size == (tmp_path / "pool" / path).stat().st_size for path, size in found.items())


def test_nested_folders(tmp_path, make_pool):
    made = [*make_pool(tmp_path / "b" / "c", [1]), *make_pool(tmp_path / "a", [1], first_shard=5)]
    assert names([tmp_path]) == sorted(map(str, made))


@pytest.mark.parametrize(
    "pattern", ["*.tar", "0000?.tar", "0000[0-2].tar", "{00000..00002}.tar", "{00000,0000{1,2}}.tar"]
)
def test_patterns(tmp_path, pool, pattern):
    assert names([tmp_path / "pool" / pattern]) == pool


def test_brace_pattern_takes_no_more_than_it_names(tmp_path, pool):
    assert names([tmp_path / "pool" / "{00001..00002}.tar"]) == pool[1:]


def test_single_tar_and_order_of_sources(pool):
    assert names([pool[2], pool[0]]) == [pool[2], pool[0]]


def test_a_tar_named_in_several_ways_counts_once(tmp_path, pool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ways = ["pool", "./pool/00000.tar", "pool/../pool/00001.tar", f"file://{pool[2]}", pool[0], "pool/*.tar"]
    assert names(ways) == pool
    assert names(reversed(ways)) == pool


def test_same_base_name_in_two_folders_is_two_tars(tmp_path, make_pool):
    made = [*make_pool(tmp_path / "a", [1]), *make_pool(tmp_path / "b", [1])]
    assert names([tmp_path / "a", tmp_path / "b"]) == list(map(str, made))


@pytest.mark.parametrize("name", ["part[1]", "what?", "a*b", "100%", "ünï"])
def test_folders_with_odd_names(tmp_path, make_pool, name):
    (path,) = make_pool(tmp_path / name, [1])
    assert names([tmp_path / name]) == [str(path)]
    assert names([path]) == [str(path)]


def test_memory_urls(make_tar_bytes):
    for shard in range(3):
        with fsspec.open(f"memory://find/{shard}.tar", "wb") as stream:
            stream.write(make_tar_bytes([]))
    urls = [f"memory:///find/{shard}.tar" for shard in range(3)]
    for source in ("memory://find", "memory://find/*.tar", "memory://find/{0..2}.tar"):
        assert names([source]) == urls
    assert names([urls[1]]) == urls[1:2]


def test_embeddings_beside_tars(tmp_path, pool, make_embeddings, make_vectors):
    make_embeddings(tmp_path / "pool", make_vectors(["a", "b", "c"]), partitions=3)
    make_embeddings(tmp_path / "pool", make_vectors(["a"]), column="text")
    found = find([str(tmp_path / "pool")])
    assert list(found.tars) == pool
    assert {column: len(partitions) for column, partitions in found.embeddings.items()} == {"image": 3, "text": 1}


def test_format_limits_what_is_looked_for(tmp_path, pool, make_embeddings, make_vectors):
    folder = str(make_embeddings(tmp_path / "pool", make_vectors(["a"])))
    assert not find([folder], "webdataset").embeddings
    assert not find([folder], "clip-retrieval").tars
    assert set(SOURCES) >= {"webdataset", "clip-retrieval"}


@pytest.mark.parametrize(
    ("source", "saying"),
    [
        ("absent", "nothing to import in"),
        ("absent.tar", "nothing to import in"),
        ("*.tar", "nothing to import in"),
        ("", "nothing to import in"),
        ("{00..01.tar", "Unbalanced braces"),
        ("gopher://host/a.tar", "gopher"),
        ("memory://nothing/here", "nothing to import in"),
    ],
)
def test_nothing_found_is_one_line(tmp_path, monkeypatch, source, saying):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=saying) as caught:
        find([source])
    assert "\n" not in str(caught.value)
    assert repr(source) in str(caught.value)


def test_one_empty_source_among_good_ones_is_told(tmp_path, pool):
    with pytest.raises(UserError, match="typo"):
        find([pool[0], str(tmp_path / "typo")])


def test_unknown_format_lists_the_known():
    with pytest.raises(UserError, match=r"unknown format 'parquetx'.*webdataset, clip-retrieval"):
        find(["anything"], "parquetx")
