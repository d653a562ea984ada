"""Finding tars and embeddings in what a user names."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.errors import UserError
from tailwise.shards.members import MemberChoice
from tailwise.sources import SOURCES, find
from tailwise.sources.tar_files import find_folders, find_remote_tables


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
        ("absent", "does not exist"),
        ("absent.tar", "does not exist"),
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
    with pytest.raises(UserError, match="unknown format 'parquetx': did you mean 'parquet'"):
        find(["anything"], "parquetx")


# --- what is missing, and what is not imported --------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["{00000..00005}.tar", "{*,x*}.tar", "00000.tar::PLACE/00007.tar", "{.,below}"])
def test_tars_missing_from_a_pattern_are_refused_by_name(tmp_path, pool, pattern):
    given = str(tmp_path / "pool" / pattern).replace("PLACE", str(tmp_path / "pool"))
    with pytest.raises(UserError, match="missing") as caught:
        find([given])
    assert any(name in str(caught.value) for name in ("00003.tar", "x*.tar", "00007.tar", "below"))
    assert "\n" not in str(caught.value)


def test_missing_remote_tars_are_refused_by_name(make_tar_bytes):
    with fsspec.open("memory://gaps/0.tar", "wb") as stream:
        stream.write(make_tar_bytes([]))
    for source in ("memory://gaps/{0..4}.tar", "memory://gaps/0.tar::memory://gaps/1.tar"):
        with pytest.raises(UserError, match=r"missing: .*gaps/1\.tar"):
            find([source])


def test_lists_joined_as_open_clip_takes_them(tmp_path, pool):
    assert names([f"{pool[1]}::{tmp_path}/pool/{{00000,00002}}.tar"]) == [pool[1], pool[0], pool[2]]


@pytest.mark.parametrize("folder", ["part[1]", "a{b,c}", "x*", "white space", "x{1..3}[y]?"])
def test_folders_with_odd_names_in_patterns(tmp_path, make_pool, folder):
    made = list(map(str, make_pool(tmp_path / folder / "in{side}", [1, 1, 1])))
    for pattern in (
        "in{side}",
        "in{side}/*.tar",
        "in{side}/{00000..00002}.tar",
        "in{side}/0000[0-2].tar",
        "*/0000?.tar",
    ):
        assert names([tmp_path / folder / pattern]) == made
    with pytest.raises(UserError, match=r"00003\.tar"):
        find([str(tmp_path / folder / "in{side}" / "{00000..00003}.tar")])


def test_files_with_odd_names_in_patterns(tmp_path, make_pool):
    (path,) = make_pool(tmp_path / "pool", [1])
    for number in range(2):
        (tmp_path / "pool" / f"x[1]_{number}.tar").write_bytes(path.read_bytes())
    assert len(names([tmp_path / "pool" / "x[1]_{0..1}.tar"])) == 2


def test_tars_below_other_tars_are_told(tmp_path, make_pool):
    top = list(map(str, make_pool(tmp_path, [1])))
    make_pool(tmp_path / "more", [1, 1], first_shard=5)
    make_pool(tmp_path / ".hidden", [1])
    found = find([str(tmp_path)])
    assert list(found.tars) == top
    assert [(item.reason, item.path.rsplit("/", 1)[1]) for item in found.left_out] == [
        ("tar in a folder below other tars", name) for name in ("00005.tar", "00006.tar")
    ]
    assert found.notes[0].startswith("not imported: 2 × tar in a folder below other tars, first ")


def test_compressed_tars_and_leftovers_are_told(tmp_path, make_pool):
    (tmp_path / "pool").mkdir()
    for name in ("a.tar.Z", "b.tar.lzma"):
        (tmp_path / "pool" / name).touch()
    for source in ("pool", "pool/a.tar.Z", "pool/*"):
        with pytest.raises(UserError, match=r"compressed tar.*unpack"):
            find([str(tmp_path / source)])
    (path,) = make_pool(tmp_path / "pool", [1])
    (tmp_path / "pool" / "._00000.tar").write_bytes(b"\0\5\x16\7")
    found = find([str(tmp_path / "pool")])
    assert list(found.tars) == [str(path)]
    assert sorted(item.reason for item in found.left_out) == ["compressed tar"] * 2 + ["leftover of macOS"]


def test_a_path_that_is_not_utf8_is_told(tmp_path, make_pool):
    made = list(map(str, make_pool(tmp_path / "pool", [1, 1])))
    try:
        (tmp_path / "pool" / "00001.tar").rename(tmp_path / "pool" / "\udcff.tar")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    found = find([str(tmp_path / "pool")])
    assert list(found.tars) == made[:1]
    (item,) = found.left_out
    assert item.reason == "path is not UTF-8"
    assert "\\udcff.tar" in item.path


def test_folders_and_tables_whose_paths_are_not_utf8_are_told(tmp_path):
    try:
        (tmp_path / "\udcff").mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    pq.write_table(pa.table({"jpg": [b"x"], "caption": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "b\udcff.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    for name in ("1.jpg", "1.txt"):
        (tmp_path / "\udcff" / name).write_bytes(b"x")
    found = find([str(tmp_path)])
    assert list(found.tars) == [str(tmp_path / "a.parquet")]
    assert sorted(item.path.rsplit("/", 1)[1] for item in found.left_out) == ["'", "b\\udcff.parquet'"]
    assert {item.reason for item in found.left_out} == {"path is not UTF-8"}


@pytest.mark.parametrize("tars", ["", "shards", "shards/a"])
@pytest.mark.parametrize("embeddings", ["", "embeddings", "clip/l14"])
def test_embeddings_are_found_below_a_folder(tmp_path, make_pool, make_embeddings, make_vectors, tars, embeddings):
    make_pool(tmp_path / tars, [2])
    make_embeddings(tmp_path / embeddings, make_vectors(["a", "b"]), partitions=2)
    make_embeddings(tmp_path / ".trash", make_vectors(["a", "b"]))
    found = find([str(tmp_path)])
    assert len(found.tars) == 1
    assert [file.path.parent.parent for file in found.embeddings["image"]] == [tmp_path / embeddings] * 2


def test_embeddings_at_a_url_are_told(make_tar_bytes):
    with fsspec.open("memory://remote-pool/0.tar", "wb") as stream:
        stream.write(make_tar_bytes([]))
    with fsspec.open("memory://remote-pool/img_emb/img_emb_0.npy", "wb") as stream:
        stream.write(b"")
    found = find(["memory://remote-pool"])
    assert [item.reason for item in found.left_out] == ["folder of embeddings at a URL"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz"])
def test_what_lies_beside_tars_is_theirs_whether_they_are_compressed_or_not(tmp_path, ending):
    for name in (f"0{ending}", "0.parquet", "1.parquet"):
        with fsspec.open(f"memory://beside{len(ending)}/{name}", "wb") as stream:
            stream.write(b"x")
    assert list(find_remote_tables(f"memory://beside{len(ending)}").tars) == [
        f"memory:///beside{len(ending)}/1.parquet"
    ]
    for name in ("a.jpg", "a.txt"):
        (tmp_path / name).touch()
    assert find_folders(tmp_path, MemberChoice()) == [f"{tmp_path}/"]
    (tmp_path / f"0{ending}").touch()
    assert find_folders(tmp_path, MemberChoice()) == []
