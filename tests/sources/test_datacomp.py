"""DataComp's metadata: files as shards without bytes, and their embeddings."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.catalog.schema import NO_OFFSET
from tailwise.shards.metadata import parse_uids, read_metadata
from tailwise.sources.datacomp import MetadataEmbeddings
from tailwise.sources.embedding_files import BadPartition

UIDS = [f"{number:032x}" for number in (11, 5, 7, 2**127)]


def rejected(content):
    return {(row["reason"], row["key"]) for row in content.rejected.to_pylist()}


def test_rows_become_samples_in_order(tmp_path, make_metadata):
    path = make_metadata(tmp_path, "x", UIDS, clip_b32_similarity_score=[0.5, None, 0.25, 1.0])
    content = read_metadata(str(path))
    rows = content.samples.to_pylist()
    assert [row["key"] for row in rows] == UIDS
    assert [row["uid"].hex() for row in rows] == UIDS
    assert [row["caption"] for row in rows] == [f"caption of {uid}" for uid in UIDS]
    assert {(row["width"], row["height"]) for row in rows} == {(640, 480)}
    assert [row["clip_b32_similarity_score"] for row in rows] == [0.5, None, 0.25, 1.0]
    np.testing.assert_allclose([row["clip_l14_similarity_score"] for row in rows], [0, 0.1, 0.2, 0.3], atol=1e-6)
    for row in rows:
        assert {row["image_offset"], row["caption_offset"]} == {NO_OFFSET}
        assert {row["image_bytes"], row["caption_bytes"]} == {0}
        assert (row["json_offset"], row["json_bytes"], row["image_extension"]) == (None, None, "")
    assert content.size_bytes == path.stat().st_size
    assert content.rejected.num_rows == 0
    assert "original_width" not in content.samples.column_names


def test_what_can_not_be_a_sample(tmp_path, make_metadata):
    uids = [*UIDS, None, "short", UIDS[0].upper(), "g" * 32, f" {UIDS[0]}", f"{4:032X}", f"{3:032x}"]
    texts = pa.array([b"text"] * 9 + [b"good", b"caf\xe9"]).to_pylist()
    texts[2] = None
    text = pa.array(texts, pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(text), text.buffers(), text.null_count)
    content = read_metadata(str(make_metadata(tmp_path, "x", uids, text=unchecked)))
    assert content.samples.column("key").to_pylist() == [UIDS[0], UIDS[1], UIDS[3], f"{4:032x}"]
    bad = "uid is not 32 hexadecimal digits"
    assert rejected(content) == {
        *((bad, uid) for uid in (None, "short", "g" * 32, f" {UIDS[0]}")),
        ("duplicate key", UIDS[0].upper()),
        ("no caption", UIDS[2]),
        ("caption is not UTF-8", f"{3:032x}"),
    }


def test_captions_that_are_too_long_are_rejected_one_by_one(tmp_path, make_metadata):
    text = ["a" * 1_000_000, "b" * 1_000_001, None, "c"]
    content = read_metadata(str(make_metadata(tmp_path, "x", UIDS, text=text)))
    assert content.samples.column("key").to_pylist() == [UIDS[0], UIDS[3]]
    assert rejected(content) == {("caption is too long", UIDS[1]), ("no caption", UIDS[2])}


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, None, 1.5, float("nan")])
def test_sides_that_tell_nothing(tmp_path, make_metadata, value):
    path = make_metadata(tmp_path, "x", UIDS, original_width=[value, 1, 2**31 - 1, 7])
    content = read_metadata(str(path))
    assert content.samples.column("width").to_pylist() == [None, 1, 2**31 - 1, 7]
    counted = [(row["stage"], row["reason"], row["rows"]) for row in content.rejected.to_pylist()]
    nothing = value is None or np.isnan(value)
    assert counted == ([] if nothing else [("metadata columns", "original_width is no whole number of pixels", 1)])


def test_sides_and_scores_may_be_absent(tmp_path, make_metadata):
    none = {"original_width": None, "original_height": None, "clip_l14_similarity_score": None, "url": None}
    samples = read_metadata(str(make_metadata(tmp_path, "x", UIDS, **none))).samples
    assert samples.column("width").null_count == len(UIDS)
    assert samples.column_names[-1] == "height"


def test_sides_that_are_lists_are_not_used(tmp_path, make_metadata):
    path = make_metadata(tmp_path, "x", UIDS, original_width=[[640], [1, 2], None, []])
    content = read_metadata(str(path))
    assert content.samples.column("key").to_pylist() == UIDS
    assert content.samples.column("width").to_pylist() == [None] * 4
    assert content.samples.column("height").to_pylist() == [480] * 4
    (row,) = content.rejected.to_pylist()
    assert (row["stage"], row["reason"], row["rows"]) == ("metadata columns", "column not used", 4)
    assert "original_width" in row["detail"]
    assert "list" in row["detail"]


@pytest.mark.parametrize("twice", ["uid", "text", "original_width", "clip_l14_similarity_score"])
def test_two_columns_of_one_name(tmp_path, make_metadata, twice):
    """Without one uid and one caption nothing can be used; a size or a score that is there twice is none."""
    path = make_metadata(tmp_path, "x", UIDS)
    table = pq.read_table(path)
    pq.write_table(table.append_column(twice, table.column(twice)), path)
    content = read_metadata(str(path))
    (row,) = content.rejected.to_pylist()
    assert row["rows"] == 4
    assert repr(twice) in row["detail"]
    if twice in ("uid", "text"):
        assert row["reason"] == "unreadable metadata"
        assert content.samples.num_rows == 0
    else:
        assert row["reason"] == "column not used"
        assert content.samples.column("key").to_pylist() == UIDS
        assert content.samples.column("height").to_pylist() == [480] * 4


@pytest.mark.parametrize("missing", ["uid", "text"])
def test_files_without_a_column_that_is_needed(tmp_path, make_metadata, missing):
    content = read_metadata(str(make_metadata(tmp_path, "x", UIDS, **{missing: None, "url": None})))
    assert content.samples.num_rows == 0
    assert rejected(content) == {("unreadable metadata", None)}


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_files_that_can_not_be_read(tmp_path, content):
    path = tmp_path / "x.parquet"
    if content is not None:
        path.write_bytes(content)
    found = read_metadata(str(path))
    assert (found.samples.num_rows, found.size_bytes) == (0, len(content or b""))
    assert rejected(found) == {("unreadable metadata", None)}


def test_the_checksum_is_of_the_samples(tmp_path, make_metadata):
    one = read_metadata(str(make_metadata(tmp_path, "x", UIDS))).index_checksum
    again = read_metadata(str(make_metadata(tmp_path / "y", "z", UIDS, url=["other"] * 4))).index_checksum
    assert one == again
    assert read_metadata(str(make_metadata(tmp_path, "w", UIDS[::-1]))).index_checksum != one


@given(
    st.lists(
        st.one_of(
            st.none(), st.text("0123456789abcdefABCDEFg ", min_size=31, max_size=33), st.uuids().map(lambda u: u.hex)
        )
    )
)
def test_uids_are_parsed_as_by_python(texts):
    parsed, good = parse_uids(pa.array(texts, pa.string()))
    expected = []
    for text, is_good in zip(texts, good, strict=True):
        fits = text is not None and len(text) == 32 and all(letter in "0123456789abcdefABCDEF" for letter in text)
        assert is_good == fits
        expected += [bytes.fromhex(text)] if fits else []
    assert [row.tobytes() for row in parsed] == expected


# --- embeddings ---------------------------------------------------------------------------------------------------------

ROWS = np.arange(12, dtype=np.float16).reshape(4, 3)


@pytest.fixture
def opened(tmp_path, make_metadata):
    """`opened(arrays, dimension=3, uids=UIDS, **options)` → what opening the member l14_img gives."""

    def run(arrays, dimension=3, uids=UIDS, **options):
        path = make_metadata(tmp_path, "x", uids, arrays, **options)
        file = MetadataEmbeddings(path.with_suffix(".npz"), path, "l14_img")
        return file.open(dimension, tmp_path / "unpacked.npy")

    return run


@pytest.mark.parametrize("compressed", [False, True])
def test_good_embeddings(opened, compressed):
    found = opened({"b32_img": ROWS[:, :2], "l14_img": ROWS}, uids=[uid.upper() for uid in UIDS], compressed=compressed)
    np.testing.assert_array_equal(found.rows[:], ROWS)
    assert [name for names in found.names for name in names.to_pylist()] == UIDS


@pytest.mark.parametrize(
    ("arrays", "reason", "rows"),
    [
        ({"l14_img": ROWS[:3]}, "rows differ from metadata", 3),
        ({"l14_img": ROWS[:, :2]}, "wrong dimension", 4),
        ({"l14_img": ROWS.astype(np.int8)}, "not an embedding matrix", 4),
        ({"l14_img": ROWS[0]}, "not an embedding matrix", 3),
        ({"l14_img": np.array([{}, 1], object)}, "unreadable embeddings", 4),
        ({"l14_txt": ROWS}, "unreadable embeddings", 4),
        (None, "no .npz beside the metadata", 0),
    ],
    ids=["length", "width", "integers", "vector", "pickled", "no member", "no file"],
)
def test_embeddings_that_can_not_be_used(opened, arrays, reason, rows):
    found = opened(arrays)
    assert isinstance(found, BadPartition)
    assert (found.reason, found.rows) == (reason, rows)


def test_embeddings_of_metadata_that_can_not_be_read(opened, tmp_path):
    opened({"l14_img": ROWS})
    path = tmp_path / "x.parquet"
    path.write_bytes(b"junk")
    found = MetadataEmbeddings(path.with_suffix(".npz"), path, "l14_img").open(3, tmp_path / "unpacked.npy")
    assert found.reason == "unreadable metadata"


def test_sizes(tmp_path, make_metadata):
    path = make_metadata(tmp_path, "x", UIDS, {"l14_img": ROWS, "bad": ROWS[0]})
    npz = path.with_suffix(".npz")
    assert MetadataEmbeddings(npz, path, "l14_img").size() == (4, 3)
    assert MetadataEmbeddings(npz, path, "bad").size() is None
    assert MetadataEmbeddings(npz, path, "absent").size() is None
    assert pq.read_metadata(path).num_rows == 4
