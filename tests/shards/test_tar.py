"""The tar index against the standard library's `tarfile`, on sound tars, cut tars and corrupted tars."""

import io
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.shards.tar import BLOCK, index_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG_NAMES = ["d" * 60 + "/" + "n" * 60 + ".jpg", "x" * 101, "y" * 256 + ".txt", "deep/" * 80 + "z.json"]


def index(content):
    return index_tar(io.BytesIO(content), len(content))


def reference(content):
    if not content:  # which tarfile takes for no tar
        return []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return [(item.name, item.offset_data, item.size) for item in tar if item.isreg()]


def special(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = linkname
    return info


def check_same(content):
    found = index(content)
    assert found.members == reference(content)
    assert found.damage is None
    assert found.damaged_name is None
    return found.members


# --- sound tars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_three_members_a_sample_and_an_empty_file(make_tar_bytes, tar_format):
    members = [
        (f"{key}.{extension}", bytes([row]) * length)
        for row, key in enumerate(["000", "001", "002"])
        for extension, length in (("jpg", 700 + row), ("txt", 0 if row == 1 else 20), ("json", 512))
    ]
    content = make_tar_bytes(members, tar_format=tar_format)
    found = check_same(content)
    assert [member.name for member in found] == [name for name, _ in members]
    assert [content[offset : offset + size] for _, offset, size in found] == [data for _, data in members]


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
@pytest.mark.parametrize("name", LONG_NAMES, ids=lambda name: str(len(name)))
def test_long_names(make_tar_bytes, tar_format, name):
    members = [("before.txt", b"b"), (name, b"content"), ("after.txt", b"a")]
    found = check_same(make_tar_bytes(members, tar_format=FORMATS[tar_format]))
    assert [member.name for member in found] == ["before.txt", name, "after.txt"]


def test_ustar_prefix(make_tar_bytes):
    name = LONG_NAMES[0]
    assert [member.name for member in check_same(make_tar_bytes([(name, b"content")]))] == [name]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["grün/日本.jpg", "café.txt", "bytes-\udcff\udc80.jpg"])
def test_names_beyond_ascii(make_tar_bytes, tar_format, name):
    assert [member.name for member in check_same(make_tar_bytes([(name, b"1")], tar_format=tar_format))] == [name]


def test_float_mtime_makes_pax_headers_that_are_skipped(make_tar_bytes):
    info = tarfile.TarInfo("a.jpg")
    info.mtime = 1234567.25
    content = make_tar_bytes([(info, b"abc"), ("b.jpg", b"def")], tar_format=tarfile.PAX_FORMAT)
    assert b"mtime=1234567.25" in content
    assert [member.name for member in check_same(content)] == ["a.jpg", "b.jpg"]


def test_global_pax_header(make_tar_bytes):
    content = make_tar_bytes([("a.jpg", b"abc")], tar_format=tarfile.PAX_FORMAT, pax_headers={"comment": "made here"})
    assert content[156:157] == b"g"
    check_same(content)


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_folders_links_and_devices_are_no_members(make_tar_bytes, tar_format):
    members = [
        (special("folder", tarfile.DIRTYPE), b""),
        ("folder/a.jpg", b"abc"),
        (special("soft.jpg", tarfile.SYMTYPE, "t" * 200), b""),
        (special("hard" * 60 + ".jpg", tarfile.LNKTYPE, "folder/a.jpg"), b""),
        (special("pipe", tarfile.FIFOTYPE), b""),
        ("folder/a.txt", b"def"),
    ]
    found = check_same(make_tar_bytes(members, tar_format=FORMATS[tar_format]))
    assert [member.name for member in found] == ["folder/a.jpg", "folder/a.txt"]


def test_old_style_and_contiguous_files(make_tar_bytes):
    members = [(special("old.jpg", tarfile.AREGTYPE), b"abc"), (special("dense.jpg", tarfile.CONTTYPE), b"defg")]
    assert [member.name for member in check_same(make_tar_bytes(members))] == ["old.jpg", "dense.jpg"]


def header_with_size(name, size, tar_format):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tar_format)


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_size_beyond_eight_gibibytes_is_read_whole(tar_format):
    size = 8 * 2**30 + 5  # doesn't fit in eleven octal digits: base 256 with GNU, a record with pax
    header = header_with_size("big.jpg", size, FORMATS[tar_format])
    found = index_tar(io.BytesIO(header), len(header) + size)
    assert found.members == [("big.jpg", len(header), size)]


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_tar_without_end_blocks(make_tar_bytes, tar_format):
    content = make_tar_bytes([("a.jpg", b"abc"), ("a.txt", b"x" * 512)], tar_format=tar_format, end=False)
    assert len(check_same(content)) == 2


def test_empty_tars(make_tar_bytes):
    assert check_same(make_tar_bytes([])) == []
    assert index(b"").members == []
    assert index(b"").damage is None


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program here")
@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_the_tar_program(tmp_path, tar_format):
    names = ["a.jpg", "sub/b.txt"] + ([] if tar_format in {"v7", "ustar"} else ["sub/" + "n" * 150 + ".jpg"])
    for name in names:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 30)
    (tmp_path / "in" / "link").symlink_to("a.jpg")
    command = ["tar", f"--format={tar_format}", "-cf", str(tmp_path / "out.tar"), "-C", str(tmp_path / "in"), "."]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"this tar program doesn't write {tar_format}")
    found = check_same((tmp_path / "out.tar").read_bytes())
    assert sorted(member.name for member in found) == sorted(f"./{name}" for name in names)


# --- any members at all -------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(["000.jpg", "a/b.c/d.txt", "é.json", *LONG_NAMES]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=90),
    st.text(st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]), min_size=1, max_size=40),
).filter(lambda name: not name.endswith("/"))
FILES = st.tuples(NAMES, st.binary(max_size=1100))
OTHERS = st.tuples(
    st.builds(special, NAMES, st.sampled_from([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]), NAMES),
    st.just(b""),
)
MEMBERS = st.lists(st.one_of(FILES, FILES, OTHERS), max_size=6)


@given(members=MEMBERS, tar_format=st.sampled_from(["gnu", "pax"]), end=st.booleans())
@settings(deadline=None, max_examples=150)
def test_any_members(make_tar_bytes, members, tar_format, end):
    content = make_tar_bytes(members, tar_format=FORMATS[tar_format], end=end)
    found = check_same(content)
    regular = [data for name, data in members if isinstance(name, str)]
    assert [content[offset : offset + size] for _, offset, size in found] == regular


# --- damage -------------------------------------------------------------------------------------------------------------


def damaged_tar(make_tar_bytes, tar_format):
    info = tarfile.TarInfo("003.jpg")
    info.mtime = 0.5
    members = [
        ("000.jpg", b"j" * 600),
        ("000.txt", b"caption"),
        ("n" * 130 + ".jpg" if tar_format != "ustar" else "001.jpg", b"k" * 512),
        ("002.txt", b""),
        (info, b"l" * 30),
    ]
    return make_tar_bytes(members, tar_format=FORMATS[tar_format])


@pytest.mark.parametrize("tar_format", FORMATS)
def test_cut_at_every_byte(make_tar_bytes, tar_format):
    content = damaged_tar(make_tar_bytes, tar_format)
    whole = index(content).members
    ends = {0, *(offset + (size + BLOCK - 1) // BLOCK * BLOCK for _, offset, size in whole)}
    data_bytes = max(ends)
    for length in range(data_bytes + 1):
        found = index(content[:length])
        assert found.members == [member for member in whole if member.offset + member.size <= length], length
        inside = [member.name for member in whole if member.offset <= length < member.offset + member.size]
        assert found.damaged_name == (inside[0] if inside else None), length
        padding = any(offset + size <= length < -(-(offset + size) // BLOCK) * BLOCK for _, offset, size in whole)
        assert (found.damage is None) == (length in ends or padding), length


@given(
    members=MEMBERS,
    tar_format=st.sampled_from(["gnu", "pax"]),
    harm=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 2**20)),
)
@settings(deadline=None, max_examples=250)
def test_corrupted_bytes_and_cuts(make_tar_bytes, members, tar_format, harm, cut):
    sound = make_tar_bytes(members, tar_format=FORMATS[tar_format], end=False)
    content = bytearray(sound)
    first_harm = len(sound)
    for place, value in harm if sound else []:
        content[place % len(sound)] = value
        first_harm = min(first_harm, place % len(sound))
    if cut is not None:
        content = content[: cut % (len(sound) + 1)]
        first_harm = min(first_harm, len(content))
    found = index(bytes(content)).members
    assert all(offset >= 0 and offset + size <= len(content) for _, offset, size in found)
    before = [member for member in index(sound).members if member.offset + member.size <= first_harm]
    assert found[: len(before)] == before


@given(st.binary(max_size=4096))
@settings(deadline=None)
def test_any_bytes(content):
    assert all(offset + size <= len(content) for _, offset, size in index(content).members)


def test_header_fields_that_are_no_numbers(make_tar_bytes):
    """A header with a right checksum and a wrong size is damage, not a crash and not an endless walk."""
    content = make_tar_bytes([("a.jpg", b"abc"), ("b.jpg", b"def")])
    for field in (b"\xff" * 12, b"-0000000001\0", b"zzzzzzzzzzz\0", b"\x80" + b"\xff" * 11):
        header = bytearray(content[1024:1536])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        found = index(content[:1024] + bytes(header) + content[1536:])
        assert [member.name for member in found.members] == ["a.jpg"], field
        assert found.damage is not None, field


@pytest.mark.parametrize(
    "records", [b"0 path=x\n", b"-5 path=x\n", b"ab path=x\n", b"12 size=-9\n", b"12 size=qq\n", b"99 path=x\n", b" \n"]
)
def test_damaged_pax_records(make_tar_bytes, records):
    content = make_tar_bytes([(special("h", b"x"), b"")]).ljust(512, b"\0")
    header = bytearray(content[:512])
    header[124:136] = f"{len(records):011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    tail = make_tar_bytes([("a.jpg", b"abc")])
    found = index(bytes(header) + records.ljust(512, b"\0") + tail)
    assert all(offset + size <= 1024 + len(tail) for _, offset, size in found.members)


def test_headers_of_small_members_are_read_together(tmp_path):
    members = [(f"{number:05d}.txt", b"x" * (number % 700)) for number in range(2000)]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = (tmp_path / "a.tar").read_bytes()

    class Counting(io.BytesIO):
        reads = 0

        def read(self, size=-1):
            self.reads += 1
            return super().read(size)

    stream = Counting(content)
    found = index_tar(stream, len(content))
    assert [(member.name, member.size) for member in found.members] == [(name, len(text)) for name, text in members]
    assert all(content[offset : offset + size] == b"x" * size for _, offset, size in found.members)
    assert found.ended
    assert stream.reads < len(content) / 8192 < 300
