"""Indexes of tars that other tools have made: used where they agree with the tar, else ignored with a reason."""

import json
import sqlite3
import tarfile

import pytest

from tailwise.shards import given_index as module
from tailwise.shards import webdataset
from tailwise.shards.webdataset import read_shard
from tailwise.storage import files
from tailwise.storage.spans import LinkEstimate

KEYS = [f"{number:05d}" for number in range(30)]


def members_of(tar):
    """Name, offset and size of each regular file, by the standard library."""
    with tarfile.open(tar) as archive:
        return [(item.name, item.offset_data, item.size) for item in archive if item.isreg()]


def samples_of(tar):
    """Components by key, in the order of the tar: as both tools group them."""
    found = {}
    for name, offset, size in members_of(tar):
        key, _, extension = name.partition(".")
        found.setdefault(key, []).append((extension, offset, size, name))
    return found


def write_dali(tar, change=lambda text: text):
    """As DALI's tools/wds2idx.py writes it."""
    samples = samples_of(tar).values()
    lines = [" ".join(" ".join(map(str, component)) for component in sample) for sample in samples]
    tar.with_suffix(".idx").write_text(change(f"v1.2 {len(samples)}\n" + "".join(f"{line}\n" for line in lines)))


def write_energon(tar, change=lambda database: None):
    """As Energon's `prepare` (7.5) writes it, for a folder above the tar's own."""
    home = tar.parents[1] / ".nv-meta"
    home.mkdir()
    name = tar.relative_to(home.parent).as_posix()
    (home / ".info.json").write_text(json.dumps({"energon_version": "7", "shard_counts": {"a.tar": 3, name: 30}}))
    with sqlite3.connect(home / "index.sqlite") as database:
        database.execute(
            "CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER "
            "NOT NULL, byte_offset INTEGER, byte_size INTEGER)"
        )
        database.execute(
            "CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset "
            "INTEGER, content_byte_size INTEGER)"
        )
        database.execute("INSERT INTO samples VALUES (0, 'other', 0, 0, 0)")
        database.execute("INSERT INTO sample_parts VALUES (0, 0, 'jpg', 512, 3)")
        for number, (key, parts) in enumerate(samples_of(tar).items()):
            database.execute("INSERT INTO samples VALUES (1, ?, ?, ?, 0)", (key, number, parts[0][1] - 512))
            for extension, offset, size, _ in parts:
                database.execute("INSERT INTO sample_parts VALUES (1, ?, ?, ?, ?)", (number, extension, offset, size))
        change(database)
    database.close()


@pytest.fixture
def tar(tmp_path, make_tar):
    members = [
        member
        for key in KEYS
        for member in ((f"{key}.jpg", bytes(600)), (f"{key}.json", b'{"width": 5}'), (f"{key}.txt", key.encode()))
    ]
    return make_tar(tmp_path / "sub" / "x.tar", members)


@pytest.fixture
def walks(watched):
    """Calls of the walk over a whole tar."""
    with watched(webdataset, "index_tar") as calls:
        yield calls


def same(found, expected):
    return (found.samples, found.index_checksum, found.fingerprint, found.members) == (
        expected.samples, expected.index_checksum, expected.fingerprint, expected.members
    )  # fmt: skip


@pytest.mark.parametrize("write", [write_dali, write_energon])
def test_an_index_gives_what_the_walk_gives(tar, walks, write):
    expected = read_shard(str(tar))
    assert len(walks) == 1 and expected.samples.num_rows == len(KEYS)
    write(tar)
    found = read_shard(str(tar))
    assert len(walks) == 1 and same(found, expected)
    assert found.rejected.num_rows == expected.rejected.num_rows == 0


DALI = {
    "another version": (lambda text: text.replace("v1.2", "v1.1"), "version v1.1"),
    "a line less": (lambda text: text[: text[:-1].rindex("\n") + 1], "29 of 30 lines"),
    "binary": (lambda text: "\0\1", "cannot be read"),
    "empty": (lambda text: "", "cannot be read"),
    "a number that is none": (lambda text: text.replace(" 600 ", " x ", 1), "cannot be read"),
    "names with spaces": (lambda text: text.replace("00003.jpg", "00 003.jpg"), "cannot be read"),
    "a member less": (lambda text: text.replace(f"json {512 * 4} 12 00000.json ", ""), "another header at byte"),
    "other sizes": (lambda text: text.replace(" 600 ", " 601 "), "is not at byte 512: 00000.jpg"),
    "other names": (lambda text: text.replace(" 000", " 100"), "is not at byte 512: 00000.jpg"),
    "escaped names": (lambda text: text.replace("00003.jpg", "\\303\\244.jpg"), "escaped names"),
}


@pytest.mark.parametrize(("change", "why"), DALI.values(), ids=DALI)
def test_an_index_that_cannot_be_used_is_ignored_with_a_reason(tar, walks, change, why):
    expected = read_shard(str(tar))
    write_dali(tar, change)
    found = read_shard(str(tar))
    assert len(walks) == 2 and same(found, expected)
    (row,) = found.rejected.to_pylist()
    assert (row["reason"], row["rows"]) == ("index not used", 0)
    assert row["detail"].startswith("DALI's index: ") and why in row["detail"]


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
@pytest.mark.parametrize("write", [write_dali, write_energon])
def test_an_index_of_an_older_tar_is_ignored(tar, make_tar, write, change):
    write(tar)
    names = {"longer": [*KEYS, "00030"], "shorter": KEYS[:-1], "other": [*KEYS[:-1], "00099"]}[change]
    members = [pair for key in names for pair in ((f"{key}.jpg", bytes(600)), (f"{key}.json", b'{"width": 5}'),
                                                  (f"{key}.txt", key.encode()))]  # fmt: skip
    make_tar(tar, members)
    found = read_shard(str(tar))
    assert found.samples.column("key").to_pylist() == names
    assert [row["reason"] for row in found.rejected.to_pylist()] == ["index not used"]


def test_a_damaged_database_is_ignored(tar):
    write_energon(tar, lambda database: database.execute("DROP TABLE sample_parts"))
    (row,) = read_shard(str(tar)).rejected.to_pylist()
    assert "no such table: sample_parts" in row["detail"]


def test_a_database_is_not_written(tar, tree_bytes):
    write_energon(tar)
    before = tree_bytes(tar.parents[1])
    read_shard(str(tar))
    assert tree_bytes(tar.parents[1]) == before


def test_a_tar_that_the_database_does_not_list_is_walked_without_a_word(tar, walks):
    write_energon(tar)
    other = tar.with_name("y.tar")
    other.write_bytes(tar.read_bytes())
    found = read_shard(str(other))
    assert len(walks) == 1 and found.rejected.num_rows == 0


@pytest.mark.parametrize("kind", ["folder", "link", "pax"])
def test_headers_between_the_members_refuse_the_index(tmp_path, kind):
    """The walk counts them; an index says nothing of them."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(40):
            if kind != "pax" and number == 17:
                info = tarfile.TarInfo("between")
                info.type, info.linkname = (tarfile.DIRTYPE if kind == "folder" else tarfile.SYMTYPE), "00000.jpg"
                archive.addfile(info)
            info = tarfile.TarInfo(f"{number:05d}.jpg")
            info.mtime = 0.5 if kind == "pax" else 0
            archive.addfile(info)
    write_dali(path)
    with path.open("rb") as stream:
        found, why = module.given_index(str(path), stream, path.stat().st_size)
    assert found is None and "another header at byte" in why


@pytest.fixture
def remote(tmp_path, make_tar):
    """A tar of 20 samples of 200 KB, and its URL."""
    import fsspec

    pairs = [((f"{key}.jpg", bytes(200_000)), (f"{key}.txt", key.encode())) for key in KEYS[:20]]
    tar = make_tar(tmp_path / "x.tar", [member for pair in pairs for member in pair])
    store = fsspec.filesystem("memory")
    store.pipe("/given/x.tar", tar.read_bytes())
    yield tar, "memory://given/x.tar"
    store.rm("/given", recursive=True)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("request_bytes", "share"), [(1000.0, (0, 0.5)), (1e6, (0.9, 1.3))])
def test_of_a_remote_tar_only_what_saves_requests_is_read(remote, watched, monkeypatch, request_bytes, share, indexed):
    import fsspec

    tar, url = remote
    expected = read_shard(str(tar))
    if indexed:
        write_dali(tar)
        fsspec.filesystem("memory").pipe("/given/x.idx", tar.with_suffix(".idx").read_bytes())
    monkeypatch.setattr(LinkEstimate, "request_bytes", request_bytes)
    monkeypatch.setattr(files, "FIRST_BYTES", 1 << 13)
    with watched(files, "read_range") as calls:
        assert same(read_shard(url), expected)
    size = tar.stat().st_size
    spans = [(start, min(stop, size)) for asked, start, stop, *_ in calls if asked == url]
    assert share[0] < sum(stop - start for start, stop in spans) / size < share[1]
    assert len(spans) <= (4 if request_bytes > 1e5 else 2 * len(KEYS))
