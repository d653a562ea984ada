"""Tars read from front to end: all regular members, within bounds."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest

from tailwise.shards import members
from tailwise.shards.members import TarContentError, stream_members


def tar_of(items, **options):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, content in items:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


ITEMS = [("a.jpg", b"one"), ("b/" * 60 + "b.jpg", b"x" * 5000), ("empty.txt", b""), ("c.jpg", b"three" * 300)]


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_the_tar(packed, form):
    stream = io.BytesIO(packed(tar_of(ITEMS, format=form)))
    assert [(member.name, member.size_bytes, member.read()) for member in stream_members(stream)] == [
        (name, len(content), content) for name, content in ITEMS
    ]


def test_members_that_are_not_read_are_skipped():
    found = [member.read() if member.name == "c.jpg" else None for member in stream_members(io.BytesIO(tar_of(ITEMS)))]
    assert found == [None, None, None, b"three" * 300]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_headers_without_end_are_refused(packed, kind):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 1 << 24
    content = info.tobuf(tarfile.GNU_FORMAT) + b"a" * (1 << 24) + tar_of(ITEMS)
    with pytest.raises(TarContentError, match="headers of more than 1,048,576 bytes"):
        list(stream_members(io.BytesIO(packed(content))))


def test_long_members_of_compressed_tars_are_refused_by_name_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(members, "MOST_PACKED_BYTES", 1000)
    with pytest.raises(TarContentError, match=r"b\.jpg has 5,000 bytes, more than 1,000"):
        list(stream_members(io.BytesIO(gzip.compress(tar_of(ITEMS)))))
    assert len(list(stream_members(io.BytesIO(tar_of(ITEMS))))) == 4


@pytest.mark.parametrize(
    ("content", "name"), [(lzma.compress(tar_of(ITEMS)), "xz"), (b"(\xb5/\xfd" + bytes(50), "zstd")]
)
def test_other_compressions_are_refused_by_name(content, name):
    with pytest.raises(TarContentError, match=f"compressed with {name}: unpack it"):
        list(stream_members(io.BytesIO(content)))
