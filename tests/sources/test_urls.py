"""Lists of URLs and captions, as LAION's metadata and img2dataset's input: pools without bytes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise import FilterRequest, Loader, PlanRequest, export_plan, filter_samples, import_pool, make_plan
from tailwise.errors import UserError
from tailwise.requests import SourceRequest
from tailwise.shards.metadata import metadata_columns, read_metadata, read_urls
from tailwise.sources.parquet_embeddings import kind_of


def laion(path, rows=6, **columns):
    """A table as LAION-400M's, with some columns replaced, or left out (None)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    usual = {
        "SAMPLE_ID": pa.array(np.arange(rows) * 1_000_003.0),
        "URL": [f"https://example.org/{path.stem}/{row}.jpg" for row in range(rows)],
        "TEXT": [f"caption {path.stem} {row}" for row in range(rows)],
        "HEIGHT": pa.array([480] * rows, pa.int32()),
        "WIDTH": pa.array([640] * rows, pa.int32()),
        "LICENSE": ["?"] * rows,
        "NSFW": ["UNLIKELY"] * rows,
        "similarity": np.arange(rows) / 10,
    }
    pq.write_table(pa.table({name: item for name, item in {**usual, **columns}.items() if item is not None}), path)
    return path


def rejected(content):
    return {(row["reason"], row["key"]) for row in content.rejected.to_pylist()}


def test_rows_of_laion_become_samples(tmp_path):
    content = read_metadata(str(laion(tmp_path / "x.parquet")))
    rows = content.samples.to_pylist()
    assert [row["key"] for row in rows] == [str(row * 1_000_003) for row in range(6)]
    assert [row["caption"] for row in rows] == [f"caption x {row}" for row in range(6)]
    assert {(row["width"], row["height"], row["uid"]) for row in rows} == {(640, 480, None)}
    assert [row["similarity"] for row in rows] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert content.samples.column_names[-2:] == ["similarity", "url_hash"] and content.rejected.num_rows == 0


def test_what_cannot_be_a_sample(tmp_path):
    path = laion(
        tmp_path / "x.parquet",
        SAMPLE_ID=[7, None, 7, 8, 9, 10],
        URL=["https://a", "https://b", "https://c", None, "https://d", "https://" + "e" * 1_000_000],
        TEXT=["a", "b", "c", "d", None, "e"],
    )
    content = read_metadata(str(path))
    assert content.samples.column("key").to_pylist() == ["7"]
    reasons = {("no SAMPLE_ID", None), ("duplicate key", "7"), ("no url", "8"), ("no caption", "9")}
    assert rejected(content) == reasons | {("url is too long", "10")}
    assert read_urls(str(path), np.array([0])) == (content.index_checksum, pa.chunked_array([["https://a"]]))


@pytest.mark.parametrize("names", [("url", "caption"), ("URL", "TEXT"), ("Url", "text")])
def test_a_list_without_ids_is_keyed_by_its_rows(tmp_path, names):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({names[0]: ["https://a", None, "https://a"], names[1]: ["x", "y", "z"]}), path)
    content = read_metadata(str(path))
    assert content.samples.select(["key", "caption"]).to_pydict() == {"key": ["0", "2"], "caption": ["x", "z"]}
    assert rejected(content) == {("no url", "1")}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["SAMPLE_ID", "URL", "TEXT", "similarity"], "urls"),
        (["url", "caption"], "urls"),
        (["url", "caption", "text"], "urls"),
        (["uid", "url", "text"], "metadata"),
        (["uid", "url", "caption"], "urls"),
        (["url", "caption", "key", "status"], "other"),  # img2dataset's sidecar
        (["url", "caption", "status"], "other"),
        (["url", "URL", "caption"], "other"),
        (["url"], "other"),
        (["caption", "text"], "other"),
    ],
)
def test_which_tables_are_lists(tmp_path, names, kind):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * len(names), names), path)
    assert kind_of(path, SourceRequest())[0] == kind
    assert (metadata_columns(names) is not None) == (kind != "other")


@given(rows=st.lists(st.tuples(st.none() | st.integers(0, 9), st.none() | st.text(max_size=3), st.none() | st.text())))
def test_each_row_is_a_sample_or_rejected_with_a_reason(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("urls") / "x.parquet"
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)] or [[]] * 3, ["SAMPLE_ID", "URL", "TEXT"])
    pq.write_table(table.cast(pa.schema({"SAMPLE_ID": pa.int64(), "URL": pa.string(), "TEXT": pa.string()})), path)
    content = read_metadata(str(path))
    first = {key: row for row, (key, *_) in reversed([*enumerate(rows)])}
    good = [
        row for row, (key, *texts) in enumerate(rows) if key is not None and first[key] == row and None not in texts
    ]
    assert content.samples.column("key").to_pylist() == [str(rows[row][0]) for row in good]
    assert content.samples.num_rows + content.rejected.num_rows == len(rows)
    checksum, urls = read_urls(str(path), np.arange(len(good)))
    assert (checksum, urls.to_pylist()) == (content.index_checksum, [rows[row][1] for row in good])


def test_from_a_list_to_what_img2dataset_downloads(tmp_path):
    for number in range(3):
        laion(tmp_path / "laion" / f"{number}.parquet", URL=[None, *(f"https://{number}/{row}" for row in range(1, 6))])
    catalog = import_pool(tmp_path / "laion", tmp_path / "catalog", workers=1, part_rows=6).catalog
    assert catalog.snapshot().rows == 15
    filter_samples(catalog, FilterRequest("similarity", minimum=0.25, name="similar"))
    plan = make_plan(catalog, "p", PlanRequest("random", keep=0.4, without=("similar",)))
    with pytest.raises(UserError, match="`epoch` does nothing in an export to urls without `captions`: leave it out"):
        export_plan(plan, "urls", tmp_path / "subset.parquet", epoch=2)
    assert export_plan(plan, "urls", tmp_path / "subset.parquet") == 9
    found = pq.read_table(tmp_path / "subset.parquet").to_pydict()
    assert [*found] == ["url", "caption", "uid"]
    drawn = [row for row in range(15) if row % 5 + 1 >= 3]  # similarity is a tenth of the row in the file
    assert {*np.flatnonzero(plan.draw(1, slice(0, 15)))} <= {*drawn}
    assert found["url"] == [f"https://{row // 5}/{row % 5 + 1}" for row in drawn]
    assert found["caption"] == [f"caption {row // 5} {row % 5 + 1}" for row in drawn]
    uids = [uid.hex() for part in catalog.parts() for uid in catalog.samples(part, ["uid"])["uid"].to_pylist()]
    assert found["uid"] == [uids[row] for row in drawn]
    with pytest.raises(UserError, match=r"9 samples .*--to urls --output SUBSET\.parquet. lists them for img2dataset"):
        Loader(plan, batch_size=2)
    laion(tmp_path / "laion" / "1.parquet")
    with pytest.raises(UserError, match=r"1\.parquet has changed since it was imported"):
        export_plan(plan, "urls", tmp_path / "other.parquet")


def test_urls_of_datacomp_are_exported_too(tmp_path, make_metadata):
    uids = [f"{number:032x}" for number in (5, 3, 9)]
    make_metadata(tmp_path / "m", "x", uids, url=["https://a", "https://b", "https://c"])
    catalog = import_pool(tmp_path / "m", tmp_path / "catalog", workers=1).catalog
    export_plan(make_plan(catalog, "p", PlanRequest("random", keep=1.0)), "urls", tmp_path / "s.parquet")
    found = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert (found["url"], found["uid"]) == (["https://a", "https://b", "https://c"], uids)


def test_a_list_beside_images_is_not_their_pool(tmp_path, make_pool):
    make_pool(tmp_path / "pool", (4,))
    laion(tmp_path / "pool" / "list.parquet")
    report = import_pool(tmp_path / "pool", tmp_path / "catalog", workers=1)
    assert report.new_samples == 4 and "list of URLs beside" in report.notes[0]
    with pytest.raises(UserError, match=r"holds images, and .*list\.parquet is a list of URLs"):
        import_pool(tmp_path / "pool" / "list.parquet", tmp_path / "catalog", workers=1)
    plan = make_plan(report.catalog, "p", PlanRequest("random", keep=1.0))
    with pytest.raises(UserError, match="holds images already"):
        export_plan(plan, "urls", tmp_path / "s.parquet")
