"""Members to samples: names, order, links, leftovers; and that every member is accounted for."""

import gzip
import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.shards import webdataset
from tailwise.shards.grouping import _HARMLESS, _MARKS, is_harmless
from tailwise.shards.webdataset import read_shard

LEFTOVERS = "leftovers of macOS, Windows or an archiver, skipped"


@pytest.fixture
def read(tmp_path, make_tar_bytes):
    """`read(members, *more)` → the content of a file of one tar, or of several joined."""

    def run(*tars, **options):
        path = tmp_path / "0.tar"
        path.write_bytes(b"".join(tar if isinstance(tar, bytes) else make_tar_bytes(tar, **options) for tar in tars))
        return read_shard(str(path))

    return run


def pair(key, caption=b"c", extension="jpg"):
    return [(f"{key}.{extension}", b"image"), (f"{key}.txt", caption)]


def other(name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info, b""


def captions(content):
    rows = content.samples.to_pylist()
    return {row["key"]: row["caption"] for row in rows}


def reasons(content):
    return Counter({(row["reason"], row["key"]): row["rows"] for row in content.rejected.to_pylist()})


def details(content):
    return [row["detail"] for row in content.rejected.to_pylist()]


def accounted(content):
    members = content.members
    return members.seen == members.imported + members.harmless + members.rejected


# --- leftovers of macOS and others --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("._a.jpg", True), ("./._a.jpg", True), ("x/.DS_Store", True), (".DS_Store", True), ("__MACOSX/a.jpg", True),
        ("x/__MACOSX/._a.jpg", True), ("PaxHeaders.123/a.jpg", True), ("./PaxHeader/a", True), ("pax_global_header", True),
        ("Thumbs.db", True), ("x/desktop.ini", True), ("Icon\r", True), ("x/@eaDir/a.jpg/SYNO", True), (".Trashes/a.jpg", True),
        ("a._b.jpg", False), ("a.jpg", False), (".hidden.jpg", False), ("MACOSX/a.jpg", False), ("x.DS_Store", False),
        ("Thumbs.db.jpg", False), ("myPaxHeader/a.jpg", False),
    ],
)  # fmt: skip
def test_leftovers(name, harmless):
    assert is_harmless(name) == harmless


def test_a_tar_packed_on_a_mac(read):
    members = [other("./x/", tarfile.DIRTYPE), ("./.DS_Store", b"x")]
    for key in ("a", "b"):
        for name, content in pair(key):
            members += [(f"./._{name}", b"\0\5\x16\7"), (f"./{name}", content)]
    content = read(members)
    assert captions(content) == {"./a": "c", "./b": "c"}
    assert reasons(content) == {(LEFTOVERS, None): 0}
    assert "5 members" in details(content)[0]
    assert (content.members.seen, content.members.imported, content.members.harmless) == (10, 4, 6)


# --- links --------------------------------------------------------------------------------------------------------------


def test_links_to_members_are_samples(read):
    members = [
        other("early.jpg", tarfile.SYMTYPE, "x/a.jpg"),
        *pair("x/a", b"caption"),
        other("early.txt", tarfile.LNKTYPE, "x/a.txt"),
        other("x/b.jpg", tarfile.SYMTYPE, "./a.jpg"),
        other("x/b.txt", tarfile.SYMTYPE, "../y/c.txt"),
        other("y/c.txt", tarfile.LNKTYPE, "./x/a.txt"),
        other("y/c.jpg", tarfile.SYMTYPE, "../x/b.jpg"),
    ]
    content = read(members)
    assert captions(content) == dict.fromkeys(["x/a", "early", "x/b", "y/c"], "caption")
    assert content.rejected.num_rows == 0
    assert len(set(content.samples.column("image_offset").to_pylist())) == 1
    assert accounted(content)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["gone.jpg", "/a.jpg", "../a.jpg", "b.jpg", "c.jpg", ""])
def test_links_to_nothing_are_rejected(read, kind, target):
    content = read([*pair("a"), other("b.jpg", kind, target), other("c.jpg", kind, "b.jpg"), ("b.txt", b"c")])
    assert captions(content) == {"a": "c"}
    assert reasons(content)["link without target", "b"] == 1
    assert reasons(content)["caption without image", "b"] == 1
    assert accounted(content)


def test_a_long_chain_of_links_takes_no_time(read):
    links = [other(f"{number}.jpg", tarfile.SYMTYPE, f"{number + 1}.jpg") for number in range(3000)]
    content = read([*links, *pair("a")])
    assert captions(content) == {"a": "c"}
    assert sum(reasons(content).values()) == 3000


@pytest.mark.parametrize("with_content", [False, True])
def test_hard_links_with_a_size(read, make_tar_bytes, with_content):
    """Old tars note the size of the file that a link is to; pax allows to store the content once more."""
    info = tarfile.TarInfo("b.jpg")
    info.type, info.linkname, info.size = tarfile.LNKTYPE, "a.jpg", 5
    link = info.tobuf(tarfile.USTAR_FORMAT) + (b"image".ljust(512, b"\0") if with_content else b"")
    content = read(make_tar_bytes(pair("a"), end=False), link, make_tar_bytes([("b.txt", b"c")]))
    assert captions(content) == {"a": "c", "b": "c"}
    assert content.rejected.num_rows == 0


# --- other kinds of members ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z", b"M"])
def test_devices_and_unknown_members_are_rejected(read, kind):
    content = read([*pair("a"), other("b.jpg", kind), *pair("c")])
    assert captions(content) == {"a": "c", "c": "c"}
    assert reasons(content) == {("not a regular file", "b"): 1}
    assert "b.jpg" in details(content)[0]
    assert accounted(content)


def test_old_sparse_files_are_rejected_and_what_follows_is_read(read, make_tar_bytes):
    info = tarfile.TarInfo("b.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # another header follows
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    sparse = bytes(header) + bytes(504) + b"\1" + bytes(7) + bytes(512) + b"s" * 512
    content = read(make_tar_bytes(pair("a"), end=False), sparse, make_tar_bytes(pair("c")))
    assert captions(content) == {"a": "c", "c": "c"}
    assert reasons(content) == {("not a regular file", "b"): 1}


def test_pax_sparse_files_are_rejected(read):
    info = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "b.jpg",
        "GNU.sparse.realsize": "9",
    }
    content = read([*pair("a"), (info, b"1\n0\n5\n12345"), ("b.txt", b"c")], tar_format=tarfile.PAX_FORMAT)
    assert captions(content) == {"a": "c"}
    assert reasons(content) == {("not a regular file", "b"): 1, ("caption without image", "b"): 1}


def test_old_folders_and_signed_checksums(read, make_tar_bytes):
    folder = tarfile.TarInfo("x/")
    folder.type = tarfile.AREGTYPE
    odd = tarfile.TarInfo("\udcff\udcfe.cls")
    header = bytearray(odd.tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(memoryview(bytes(header)).cast('b')):06o}\0 ".encode()
    content = read(make_tar_bytes([*pair("a"), (folder, b"")], end=False), bytes(header), make_tar_bytes(pair("c")))
    assert captions(content) == {"a": "c", "c": "c"}
    assert content.members.harmless == 1
    assert accounted(content)


def test_star_keeps_times_behind_a_shorter_prefix(read, make_tar_bytes):
    prefix = "p" * 131
    header = bytearray(make_tar_bytes([(f"{prefix}/a.jpg", b"image")])[:512])
    header[476:508] = b"1" * 32
    header[508:512] = b"tar\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    content = read(bytes(header) + b"image".ljust(512, b"\0"), make_tar_bytes([(f"{prefix}/a.txt", b"c")]))
    assert captions(content) == {f"{prefix}/a": "c"}


# --- several tars in one file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0, 512, 10_240, 200_000])
def test_tars_joined_to_one_file(read, zeros):
    content = read(pair("a"), bytes(zeros // 512 * 512), pair("b"), bytes(512), pair("c"))
    assert captions(content) == dict.fromkeys("abc", "c")
    assert content.rejected.num_rows == 0


@pytest.mark.parametrize("zeros", [1024, 10_240, 1_000_448])
def test_padding_is_normal(read, make_tar_bytes, zeros):
    content = read(make_tar_bytes(pair("a"), end=False), bytes(zeros))
    assert captions(content) == {"a": "c"}
    assert content.rejected.num_rows == 0


def test_bytes_behind_the_end_are_told(read):
    content = read(pair("a"), gzip.compress(b"another tar"))
    assert captions(content) == {"a": "c"}
    assert reasons(content) == {("truncated or damaged tar", None): 1}
    assert "behind the end" in details(content)[0]


# --- names --------------------------------------------------------------------------------------------------------------


def test_dotted_base_names_are_samples(read):
    members = [item for number in range(50) for item in pair(f"photo.{number:04d}")]
    content = read([*members, *pair("good"), ("photo.0007.json", b'{"width": 7}')])
    assert set(captions(content)) == {*(f"photo.{number:04d}" for number in range(50)), "good"}
    assert content.samples.column("width").to_pylist()[7] == 7
    assert content.rejected.num_rows == 0


def test_dotted_base_names_are_counted_one_by_one(read):
    content = read([*[(f"photo.{number:04d}.jpg", b"i") for number in range(50)], *pair("good")])
    assert captions(content) == {"good": "c"}
    assert sum(reasons(content).values()) == 50
    assert accounted(content)


def test_webdataset_extensions_stay_with_their_sample(read):
    members = [
        *pair("a"),
        ("a.seg.png", b"s"),
        ("a.cls.txt", b"5"),
        ("a.seg.json", b"{}"),
        *pair("b.c", b"dotted"),
        ("b.c.seg.png", b"s"),
    ]
    content = read(members)
    assert captions(content) == {"a": "c", "b.c": "dotted"}
    assert content.members.imported == len(members)
    assert content.rejected.num_rows == 0


def test_copies_beside_the_original_are_not_lost(read):
    content = read([*pair("a", b"1"), *pair("a.copy", b"2"), *pair("a.copy.copy", b"3")])
    assert captions(content) == {"a": "1", "a.copy": "2", "a.copy.copy": "3"}


def test_other_images_are_named(read):
    content = read(
        [
            ("a.tif", b"i"),
            ("a.txt", b"c"),
            ("b.c.bmp", b"i"),
            ("b.c.txt", b"c"),
            ("c.jpg", b""),
            ("c.txt", b"c"),
            ("d.txt", b""),
        ]
    )
    other, missing = "image has another suffix", "caption without image"
    assert set(reasons(content)) == {(other, "a"), (other, "b.c"), (missing, "c"), (missing, "d")}
    assert [detail and detail.split(";")[0] for detail in details(content)] == [
        "there is .tif",
        "there is .bmp",
        ".jpg is empty",
        None,
    ]


def test_many_extensions_are_cut_short(read):
    content = read([(f"a.{number}", b"") for number in range(2000)])
    assert details(content) == ["only .0, .1, .2, .3, .4 and 1,995 more"]


@pytest.mark.parametrize(
    "name", ["c.j\udcffg", "d.t\udcfft", "\udcff", "e\n.jpg", "f\r.txt", "\x1b[31m.jpg", ".jpg", "."]
)
def test_odd_names_cost_nobody_else(read, name):
    content = read([*pair("a"), (name, b"x")], tar_format=tarfile.GNU_FORMAT)
    assert captions(content) == {"a": "c"}
    assert sum(reasons(content).values()) == 1
    assert accounted(content)


# --- order --------------------------------------------------------------------------------------------------------------


def test_all_images_before_all_captions_before_all_descriptions(read):
    keys = [f"{number:03d}" for number in range(30)]
    kinds = [
        ("jpg", lambda key: b"i"),
        ("txt", str.encode),
        ("json", lambda key: json.dumps({"width": int(key) + 1}).encode()),
    ]
    content = read([(f"{key}.{extension}", make(key)) for extension, make in kinds for key in keys])
    assert captions(content) == {key: key for key in keys}
    assert content.samples.column("width").to_pylist() == [int(key) + 1 for key in keys]
    assert content.rejected.num_rows == 0


def test_duplicates_in_any_order_are_told(read):
    images, texts = (
        [("a.jpg", b"1"), ("b.jpg", b"1"), ("a.jpg", b"2")],
        [("a.txt", b"first"), ("b.txt", b"c"), ("a.txt", b"second")],
    )
    content = read([*images, *texts])
    assert captions(content) == {"b": "c"}  # nobody knows which caption of a belongs to which image
    assert {reason for reason, _ in reasons(content)} == {"duplicate key", "image without caption"}
    assert accounted(content)


def test_duplicates_of_links_are_told(read):
    a = [("a.jpg", b"1"), other("a.txt", tarfile.SYMTYPE, "c.txt")]
    content = read([*a, ("c.txt", b"c"), ("c.jpg", b"2"), *a])
    assert captions(content) == {"a": "c", "c": "c"}
    assert reasons(content) == {("duplicate key", "a"): 1}


def test_a_description_of_a_duplicate_does_not_go_to_the_first(read):
    content = read([*pair("a"), *pair("b"), ("a.json", b'{"width": 9}'), *pair("a")])
    assert content.samples.column("width").to_pylist() == [None, None]
    assert reasons(content) == {("duplicate key", "a"): 1}


# --- what is no plain tar -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_compressed_files_are_named(read, start, name):
    content = read(start + bytes(1000))
    assert reasons(content) == {("compressed tar", None): 1}
    assert name in details(content)[0]
    assert "unpack" in details(content)[0]


def test_a_tar_that_is_cut_while_it_is_read(tmp_path, make_tar, watched):
    members = [item for key in "abcd" for item in pair(key)]
    path = make_tar(tmp_path / "0.tar", [*members, ("e.jpg", bytes(1 << 20)), ("e.txt", b"more than a buffer holds")])
    with watched(webdataset, "read_fingerprint", lambda *_: os.truncate(path, 2048)):  # the last reading of an import
        content = read_shard(str(path))
    assert content.samples.num_rows == 0
    assert (content.rejected.to_pylist()[0]["reason"], content.size_bytes) == ("unreadable tar", 0)


# --- any tar at all -----------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "c", "p.1", "p.2", "x/a", "./a", "._a", "__MACOSX/a", "k\udcff", "l\n", "n" * 120])
EXTENSIONS = st.sampled_from(["jpg", "png", "txt", "json", "tif", "cls", "seg.png", "j\udcffg", "", "JPG"])
NAMES = st.one_of(
    st.builds("{}.{}".format, KEYS, EXTENSIONS), st.sampled_from([".DS_Store", "README", "dir/", ".", "x/.hidden.jpg"])
)
CONTENTS = st.sampled_from([b"", b"caption", b"caf\xe9", b'{"width": 3}', b"z" * 700])
KINDS = st.sampled_from(
    [
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
        b"M",
        b"D",
    ]
)
MEMBERS = st.lists(
    st.one_of(st.tuples(NAMES, CONTENTS), st.tuples(NAMES, CONTENTS), st.builds(other, NAMES, KINDS, NAMES)),
    max_size=12,
)
TARS = st.lists(
    st.tuples(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans()), max_size=3
)
HARM = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=3)


def imported_members(content):
    """Members of samples, at least: image, caption and JSON of each."""
    return sum(2 + (row["json_offset"] is not None) for row in content.samples.to_pylist())


@given(tars=TARS, harm=HARM, length=st.one_of(st.none(), st.integers(0, 2**20)))
@settings(deadline=None, max_examples=300)
def test_every_member_is_imported_or_harmless_or_rejected(make_tar_bytes, tars, harm, length):
    sound = b"".join(make_tar_bytes(members, tar_format=form, end=end) for members, form, end in tars)
    stored = bytearray(sound)
    for place, value in harm if sound else []:
        stored[place % len(stored)] = value
    if length is not None:
        stored = stored[: length % (len(stored) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(stored)
        content = read_shard(str(path))
    members = content.members
    assert accounted(content), members
    assert members.imported >= imported_members(content)
    assert all(row["image_offset"] + row["image_bytes"] <= len(stored) for row in content.samples.to_pylist())
    if sound and bytes(stored) == sound:
        with tarfile.open(fileobj=io.BytesIO(sound), mode="r:", ignore_zeros=True) as tar:
            assert members.seen == len(tar.getmembers())
    if members.rejected and content.size_bytes:
        assert sum(row["rows"] for row in content.rejected.to_pylist()) > 0


@given(st.from_regex(_HARMLESS))
def test_each_leftover_has_a_mark_that_is_looked_for_first(name):
    assert not is_harmless(name) or any(mark in name for mark in _MARKS)
