"""Webdataset shards: grouping, captions, JSON, sidecars, and every fault by reason."""

import io
import json
import re
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tailwise.shards import webdataset
from tailwise.shards.content import hashed_uid
from tailwise.shards.grouping import split_name
from tailwise.shards.metadata import parse_uid
from tailwise.shards.webdataset import read_shard

UID = "00112233445566778899aabbccddeeff"


@pytest.fixture
def shard(tmp_path, make_tar):
    """`shard(members, sidecar=None)` → the content of a tar as `read_shard` gives it."""

    def read(members, sidecar=None, **options):
        path = make_tar(tmp_path / "00000.tar", members, **options)
        if sidecar is not None:
            pq.write_table(pa.table(sidecar), path.with_suffix(".parquet"))
        return read_shard(str(path))

    return read


def sample(key, caption=b"a caption", image=b"image", extension="jpg"):
    return [(f"{key}.{extension}", image), (f"{key}.txt", caption)]


def keys(content):
    return content.samples.column("key").to_pylist()


def reasons(content):
    return Counter((row["reason"], row["key"]) for row in content.rejected.to_pylist() for _ in range(row["rows"]))


# --- what is good -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_a_sample_points_at_its_bytes(tmp_path, make_tar, make_image, extension):
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    image = make_image(kind=kind)
    description = json.dumps({"width": 8, "height": 9, "uid": UID}).encode()
    members = [("a.json", description), ("a.txt", "grüß dich".encode()), (f"a.{extension}", image)]
    path = make_tar(tmp_path / "0.tar", members)
    content = read_shard(str(path))
    (row,) = content.samples.to_pylist()
    stored = path.read_bytes()

    def cut(part):
        return stored[row[f"{part}_offset"] :][: row[f"{part}_bytes"]]

    assert cut("image") == image
    assert cut("caption").decode() == row["caption"] == "grüß dich"
    assert cut("json") == description
    assert row["image_extension"] == extension
    assert (row["width"], row["height"], row["uid"]) == (8, 9, bytes.fromhex(UID))
    assert content.size_bytes == len(stored)
    assert content.rejected.num_rows == 0


def test_no_json_and_no_sidecar_leave_nulls(shard):
    (row,) = shard(sample("a")).samples.to_pylist()
    absent = {name for name, value in row.items() if value is None}
    assert absent == {"shard", "uid", "json_offset", "json_bytes", "width", "height"}


def test_upper_case_extensions(shard):
    assert keys(shard([("a.JPG", b"i"), ("a.TXT", b"c")])) == ["a"]


def test_first_image_extension_of_several(shard):
    content = shard([("a.webp", b"webp"), ("a.jpg", b"jpg"), ("a.txt", b"c")])
    assert content.samples.column("image_extension").to_pylist() == ["jpg"]


def test_empty_caption_stays(shard):
    content = shard(sample("a", caption=b""))
    assert content.samples.column("caption").to_pylist() == [""]
    assert content.rejected.num_rows == 0


def test_samples_keep_the_order_of_the_tar(shard):
    assert keys(shard([*sample("c"), *sample("a"), *sample("b")])) == ["c", "a", "b"]


def test_folders_belong_to_the_key(shard):
    content = shard([*sample("x/a"), *sample("y/a"), *sample("v1.2/a")])
    assert keys(content) == ["x/a", "y/a", "v1.2/a"]


def test_files_that_make_no_sample_are_told(shard):
    content = shard([("README", b"hello"), *sample("a"), ("a.cls", b"5"), ("b.cls", b"6")])
    assert keys(content) == ["a"]
    assert content.rejected["reason"].to_pylist() == ["neither image nor caption"] * 2
    assert content.rejected["key"].to_pylist() == ["README", "b"]


def test_zero_bytes_are_a_shard_of_nothing(tmp_path):
    (tmp_path / "0.tar").touch()
    content = read_shard(str(tmp_path / "0.tar"))
    assert (content.samples.num_rows, content.rejected.num_rows, content.size_bytes) == (0, 1, 0)
    assert content.rejected.column("reason").to_pylist() == ["tar without an end"]


def test_remote_shard_reads_like_a_local_one(shard, make_tar_bytes):
    members = [*sample("a"), *sample("b")]
    sidecar = {"key": ["a"], "score": [0.5]}
    local = shard(members, sidecar)
    with fsspec.open("memory://pool/00000.tar", "wb") as stream:
        stream.write(make_tar_bytes(members))
    with fsspec.open("memory://pool/00000.parquet", "wb") as stream:
        pq.write_table(pa.table(sidecar), stream)
    remote = read_shard("memory://pool/00000.tar")
    assert remote.samples.equals(local.samples)
    assert remote.index_checksum == local.index_checksum


# --- keys and extensions ------------------------------------------------------------------------------------------------


def webdataset_split(path):
    """What webdataset.tariterators.base_plus_ext does."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", path)
    return (match[1], match[2]) if match else (None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("a/b/000.jpg", ("a/b/000", "jpg")),
        ("./000.txt", ("./000", "txt")),
        ("v1.0/000.seg.png", ("v1.0/000", "seg.png")),
        ("000.JPG", ("000", "jpg")),
        ("folder.d/name", ("folder.d/name", "")),
    ],
)
def test_split_name(name, expected):
    assert split_name(name) == expected


@given(st.text("ab./-é", min_size=1, max_size=12))
@example("a.b/c.d.e")
def test_split_name_as_webdataset_does(name):
    key, extension = webdataset_split(name)
    if key is not None:  # names that webdataset skips have no extension that we take
        assert split_name(name) == (key, extension.lower())


def test_webdataset_itself_finds_the_same_samples(tmp_path, make_tar):
    webdataset = pytest.importorskip("webdataset")
    members = [*sample("a", b"one"), *sample("x.y/b", b"two", extension="png"), ("x.y/b.json", b"{}")]
    path = str(make_tar(tmp_path / "0.tar", members))
    theirs = [(item["__key__"], item["txt"].decode()) for item in webdataset.WebDataset(path, shardshuffle=False)]
    ours = read_shard(path).samples
    assert list(zip(keys(read_shard(path)), ours.column("caption").to_pylist(), strict=True)) == theirs


# --- uids ---------------------------------------------------------------------------------------------------------------


def test_hashed_uid_is_pinned():
    assert hashed_uid(3, "000000123").hex() == "ce4fa30eee65a562655c2ac15ac09980"


@given(st.one_of(st.none(), st.integers(), st.text(), st.text("0123456789abcdefABCDEF \t_-", min_size=32, max_size=32)))
@example("ab cd ef 01 23 45 67 89 ab cd ef")
@example(UID.upper())
def test_parse_uid_takes_32_hexadecimal_digits_only(value):
    uid = parse_uid(value)
    if isinstance(value, str) and re.fullmatch("[0-9a-fA-F]{32}", value):
        assert uid == bytes.fromhex(value)
    else:
        assert uid is None


# --- JSON ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"width": true, "height": 0}',
        b'{"width": "8", "height": -3}',
        b'{"width": 99999999999, "height": 1.5, "uid": "short"}',
        b'{"uid": "ab cd ef 01 23 45 67 89 ab cd ef"}',
    ],
    ids=range(10),
)
def test_broken_or_foreign_json_does_no_harm(shard, content):
    found = shard([*sample("a"), ("a.json", content)])
    (row,) = found.samples.to_pylist()
    assert (row["uid"], row["width"], row["height"]) == (None, None, None)
    assert row["json_bytes"] == len(content)
    counted = found.rejected.to_pylist()
    assert all((row["stage"], row["rows"], row["key"]) == ("json", 1, None) for row in counted)
    reasons = {
        ".json is no JSON object": not content.startswith(b'{"'),
        "width in .json is no whole number of pixels": b"width" in content,
        "height in .json is no whole number of pixels": b"height" in content,
        "uid in .json is not 32 hexadecimal digits": b"uid" in content,
    }
    assert {row["reason"] for row in counted} == {reason for reason, there in reasons.items() if there}


# --- sidecars -----------------------------------------------------------------------------------------------------------


def test_sidecar_gives_sizes_uid_and_scores(shard):
    sidecar = {
        "url": ["u", "u", "u"],
        "key": ["b", "a", "gone"],
        "status": ["success", "success", "failed_to_download"],
        "error_message": [None, None, "404"],
        "width": pa.array([10, 20, None], pa.int32()),
        "height": pa.array([11, 21, None], pa.int32()),
        "original_width": pa.array([99, 99, None], pa.int32()),
        "uid": [UID, None, None],
        "similarity": pa.array([0.25, None, 0.75], pa.float32()),
        "votes": [7, 8, 9],
        "safe": [True, False, None],
    }
    content = shard([*sample("a"), *sample("b")], sidecar)
    a, b = content.samples.to_pylist()
    assert (a["width"], a["height"], a["uid"], a["similarity"], a["votes"]) == (20, 21, None, None, 8.0)
    assert (b["width"], b["height"], b["uid"], b["similarity"], b["votes"]) == (10, 11, bytes.fromhex(UID), 0.25, 7.0)
    assert content.samples.schema.field("votes").type == pa.float64()
    assert not {"url", "safe", "status", "original_width"} & set(content.samples.column_names)


def test_failed_rows_of_the_sidecar_count_for_nothing(shard):
    sidecar = {"key": ["a", "a"], "status": ["failed_to_resize", "success"], "width": [1, 2], "score": [0.1, 0.2]}
    assert shard(sample("a"), sidecar).samples.to_pylist()[0]["score"] == 0.2
    sidecar = {"key": ["a"], "status": ["failed_to_resize"], "width": [1], "score": [0.1]}
    content = shard(sample("a"), sidecar)
    assert content.samples.column("width").to_pylist() == [None]
    assert "score" not in content.samples.column_names or content.samples.column("score").to_pylist() == [None]


def test_sidecar_without_status(shard):
    assert shard(sample("a"), {"key": ["a"], "score": [1]}).samples.column("score").to_pylist() == [1.0]


def test_sidecar_wins_over_json(shard):
    members = [*sample("a"), ("a.json", json.dumps({"width": 5, "uid": "f" * 32}).encode())]
    (row,) = shard(members, {"key": ["a"], "width": [6], "uid": [UID]}).samples.to_pylist()
    assert (row["width"], row["uid"]) == (6, bytes.fromhex(UID))


def test_sidecar_without_key_is_no_sidecar(shard):
    content = shard(sample("a"), {"score": [1]})
    assert keys(content) == ["a"]
    assert content.samples.column_names == shard(sample("a"), {"key": ["a"]}).samples.column_names


def test_sidecar_can_not_overwrite_the_columns_of_the_catalog(shard):
    (row,) = shard(sample("a"), {"key": ["a"], "image_offset": [7], "shard": [3]}).samples.to_pylist()
    assert (row["image_offset"], row["shard"]) == (512, None)


def test_sidecar_with_strings_that_are_not_utf8(shard):
    strings = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    found = shard(sample("a"), {"key": strings, "score": [1]})
    assert keys(found) == ["a"]
    assert reasons(found) == {("unreadable sidecar", None): 1}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", None], ids=["empty", "short", "other", "cut"])
def test_damaged_sidecar_loses_the_scores_only(shard, tmp_path, content):
    shard(sample("a"), {"key": ["a"], "score": [1]})
    path = tmp_path / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    found = shard(sample("a"))
    assert keys(found) == ["a"]
    assert "score" not in found.samples.column_names
    (row,) = found.rejected.to_pylist()
    assert (row["reason"], row["rows"], row["key"]) == ("unreadable sidecar", 0, None)


# --- faults, by reason --------------------------------------------------------------------------------------------------

GOOD = sample("good")


@pytest.mark.parametrize(
    ("members", "reason", "key"),
    [
        ([("b.jpg", b"i")], "image without caption", "b"),
        ([("b.jpg", b"i"), ("b.json", b"{}")], "image without caption", "b"),
        ([("b.txt", b"c")], "caption without image", "b"),
        ([("b.txt", b"c"), ("b.gif", b"i")], "image has another suffix", "b"),
        ([("b.json", b"{}")], "neither image nor caption", "b"),
        (sample("b", caption=b"caf\xe9"), "caption is not UTF-8", "b"),
        (sample("b\udcff"), "key is not UTF-8", "'b\\udcff'"),
        ([("b\udcff.jpg", b"i")], "image without caption", "'b\\udcff'"),
        (sample("good", caption=b"another"), "duplicate key", "good"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_has_its_reason(shard, members, reason, key):
    for order in ([*GOOD, *members], [*members, *GOOD]) if reason != "duplicate key" else ([*GOOD, *members],):
        content = shard(order, tar_format=tarfile.GNU_FORMAT)
        assert keys(content) == ["good"]
        assert content.samples.column("caption").to_pylist() == ["a caption"]
        assert reasons(content) == {(reason, key): 1}


def test_duplicate_key_apart_and_thrice(shard):
    content = shard(
        [*sample("a", b"first"), *sample("b"), *sample("a", b"second"), *sample("c"), *sample("a", b"third")]
    )
    assert keys(content) == ["a", "b", "c"]
    assert content.samples.column("caption").to_pylist()[0] == "first"
    assert reasons(content) == {("duplicate key", "a"): 2}


def test_duplicate_key_in_succession(shard):
    """Without another key between, the second sample shows only by an extension that was there already."""
    content = shard([*sample("a", b"first"), *sample("a", b"second"), *sample("b")])
    assert content.samples.column("caption").to_pylist() == ["first", "a caption"]
    assert reasons(content) == {("duplicate key", "a"): 1}


def test_members_of_a_sample_may_lie_apart(shard):
    content = shard(
        [("a.jpg", b"i"), ("b.jpg", b"j"), ("a.txt", b"c"), ("b.txt", b"d"), ("a.json", b"{}"), ("b.json", b"{}")]
    )
    assert content.samples.column("caption").to_pylist() == ["c", "d"]
    assert content.samples.column("image_offset").to_pylist() == [512, 1536]
    assert content.samples.column("json_bytes").to_pylist() == [2, 2]
    assert content.rejected.num_rows == 0


@pytest.mark.parametrize(
    ("cut_at", "kept", "key"),
    [
        (2048 + 512 + 100, ["a"], "b"),  # within the second image
        (2048 + 1024 + 512 + 2, ["a"], "b"),  # within the second caption
        (2048 + 1024 + 100, ["a"], "b"),  # within the second caption's header
        (512 + 3, [], "a"),
        (2048 + 10, ["a"], None),  # within the header of the second image, whose name nobody knows
    ],
)
def test_truncated_tar(tmp_path, make_tar, cut_at, kept, key):
    path = make_tar(tmp_path / "0.tar", [*sample("a"), *sample("b", image=b"i" * 500), *sample("c")])
    path.write_bytes(path.read_bytes()[:cut_at])
    content = read_shard(str(path))
    assert keys(content) == kept
    assert reasons(content) == {("truncated or damaged tar", key): 1}


def test_tar_cut_within_a_pax_header(tmp_path, make_tar):
    """The cut header has a name of its own, which is no sample's."""
    members = [*sample("a"), ("bé.jpg", b"image"), ("bé.txt", b"caption")]
    path = make_tar(tmp_path / "0.tar", members, tar_format=tarfile.PAX_FORMAT)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("bé.txt".encode()) - 3])
    found = read_shard(str(path))
    assert keys(found) == ["a"]
    assert reasons(found) == {("truncated or damaged tar", "bé"): 1}


@pytest.mark.parametrize("content", [b"<html>", b"no tar at all" * 100, b"\x1f" + bytes(1000)])
def test_not_a_tar(tmp_path, content):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    found = read_shard(str(path))
    assert found.samples.num_rows == 0
    assert reasons(found) == {("not a tar", None): 1}


def test_missing_file_is_told(tmp_path):
    found = read_shard(str(tmp_path / "absent.tar"))
    assert found.samples.num_rows == 0
    (row,) = found.rejected.to_pylist()
    assert (row["reason"], row["key"], row["rows"]) == ("unreadable tar", None, 0)
    assert "absent.tar" in row["file"]


def full_shard(make_tar_bytes):
    members = [
        member
        for key in ("a", "b", "cé")
        for member in [*sample(key, image=b"j" * 520), (f"{key}.json", json.dumps({"width": 3, "uid": UID}).encode())]
    ]
    return make_tar_bytes(members, tar_format=tarfile.PAX_FORMAT)


@given(
    harm=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6),
    length=st.one_of(st.none(), st.integers(0, 2**20)),
)
@settings(deadline=None, max_examples=150)
def test_a_damaged_shard_never_crashes(make_tar_bytes, harm, length):
    sound = full_shard(make_tar_bytes)
    content = bytearray(sound)
    for place, value in harm:
        content[place % len(content)] = value
    content = content[: length % (len(content) + 1)] if length is not None else content
    first_harm = min([len(content), *(place % len(sound) for place, _ in harm)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(content)
        found = read_shard(str(path))
    rows = found.samples.to_pylist()
    assert all(row["image_offset"] + row["image_bytes"] <= len(content) for row in rows)
    with tarfile.open(fileobj=io.BytesIO(sound)) as tar:
        ends = {item.name: item.offset_data + item.size for item in tar}
    intact = [key for key in ("a", "b", "cé") if ends[f"{key}.json"] <= first_harm]
    assert [row["key"] for row in rows][: len(intact)] == intact
    assert all(row["uid"] == bytes.fromhex(UID) for row in rows[: len(intact)])


# --- the checksum of a tar's index --------------------------------------------------------------------------------------


def test_index_checksum_is_of_names_offsets_and_sizes(shard):
    first = shard(sample("a"))
    assert first.index_checksum == "0408e93c708edc38e442b4217b719cbb"
    assert shard(sample("a", caption=b"other one")).index_checksum == first.index_checksum
    assert shard(sample("b")).index_checksum != first.index_checksum
    assert shard(sample("a", caption=b"longer than it was")).index_checksum != first.index_checksum


def test_the_json_is_read_only_for_what_the_sidecar_does_not_tell(tmp_path, make_tar, make_image, watched):
    members, rows = [], []
    for number in range(4):
        told = {"width": 10 + number, "height": 20, "uid": f"{number:032x}", "sha256": f"{number:064x}"}
        members += [
            (f"{number}.jpg", make_image()),
            (f"{number}.txt", b"x"),
            (f"{number}.json", json.dumps(told).encode()),
        ]
        rows.append({"key": str(number), **told, "width": 90, **({"uid": None} if number == 2 else {})})
    path = make_tar(tmp_path / "0.tar", members)
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "0.parquet")
    with watched(webdataset, "_from_json") as calls:
        samples = webdataset.read_shard(str(path)).samples.to_pylist()
    assert [value["uid"] for value, _ in calls] == [f"{number:032x}" for number in (2, 3)]
    assert [(row["width"], row["height"], row["uid"].hex()) for row in samples] == [
        (90 if number < 3 else 13, 20, f"{number:032x}") for number in range(4)
    ]
