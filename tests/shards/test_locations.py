"""Locations and names: what the Parquet files say, row by row, whatever the parts and the order of the rows."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.files import file_digest, note_digest, read_record, write_record, write_table
from tailwise.errors import UserError
from tailwise.shards.locations import LOCATION, Locations, ensure_locations, locations_path


@pytest.fixture
def located(small_catalog):
    ensure_locations(small_catalog, small_catalog.snapshot())
    return small_catalog


def records(catalog):
    return [row for part in catalog.parts() for row in catalog.samples(part).to_pylist()]


@pytest.mark.parametrize("rows", [[], [0], [599, 0, 460, 459, 0], list(range(600))])
def test_locations_are_those_of_the_catalog(located, rows):
    expected = records(located)
    found = Locations(located, located.snapshot()).of(np.array(rows, np.int64))
    assert found.dtype == LOCATION
    for name in LOCATION.names:
        assert found[name].tolist() == [expected[row][name] for row in rows]


def test_bytes_at_a_location_are_the_sample(located):
    expected = records(located)
    paths = located.shards().column("path").to_pylist()
    rows = np.array([3, 470])
    for row, place in zip(rows.tolist(), Locations(located, located.snapshot()).of(rows), strict=True):
        with open(paths[expected[row]["shard"]], "rb") as stream:  # noqa: PTH123
            content = stream.read()
        start = place["caption_offset"]
        assert content[start : start + place["caption_bytes"]].decode() == expected[row]["caption"]


@pytest.mark.parametrize("row", [-1, 600])
def test_rows_outside_are_refused(located, row):
    locations = Locations(located, located.snapshot())
    for read in (locations.of, locations.names):
        with pytest.raises(IndexError, match=f"row {row} "):
            read(np.array([5, row]))


def test_pickled_locations_open_their_files_again(located):
    locations = Locations(located, located.snapshot())
    rows = np.arange(600)
    before = locations.of(rows)
    content = pickle.dumps(locations)
    assert len(content) < 600 * LOCATION.itemsize
    assert np.array_equal(pickle.loads(content).of(rows), before)


def test_more_parts_than_may_be_open(located):
    locations = Locations(located, located.snapshot(), open_parts=1)
    rows = np.array([0, 599] * 5)
    assert locations.of(rows)["image_offset"].tolist() == [records(located)[row]["image_offset"] for row in rows]
    assert len(locations._maps.values()) == 1


@pytest.mark.slow
def test_threads_may_share_the_maps(located, monkeypatch):
    monkeypatch.setattr("tailwise.shards.locations.RELEASE_AFTER_ROWS", 50)
    locations = Locations(located, located.snapshot(), open_parts=1)
    expected = np.array([record["image_offset"] for record in records(located)])

    def work(seed):
        for rows in np.random.default_rng(seed).integers(0, 600, (1000, 8)):
            assert np.array_equal(locations.of(rows)["image_offset"], expected[rows])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what they raise


def test_again_changes_nothing(located):
    paths = [locations_path(located, part) for part in located.parts()]
    before = [path.stat().st_mtime_ns for path in paths]
    ensure_locations(located, located.snapshot())
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("damage", ["rows", "dtype", "cut", "empty"])
def test_a_wrong_file_is_made_anew(located, damage):
    part = located.parts()[1]
    path = locations_path(located, part)
    good = path.read_bytes()
    if damage == "rows":
        np.save(path, np.zeros(part.rows - 1, LOCATION))
    elif damage == "dtype":
        np.save(path, np.zeros(part.rows, np.int64))
    else:
        path.write_bytes(good[: len(good) // 2] if damage == "cut" else b"")
    there = np.load(BytesIO(good))
    assert Locations(located, located.snapshot()).of(np.array([599])) == there[-1:]
    assert path.read_bytes() == good


def spoil(catalog, change):
    """Changes the samples of the first part, as if the import had written them so."""
    path = catalog.samples_path(0)
    write_table(path, change(pq.read_table(path)))
    marker = path.with_suffix(".json")
    write_record(marker, {**read_record(marker), "digest": file_digest(path)})


def test_missing_rows_of_the_catalog_are_an_error(small_catalog):
    spoil(small_catalog, lambda table: table.slice(1))
    with pytest.raises(UserError, match="459 of 460 rows"):
        ensure_locations(small_catalog, small_catalog.snapshot())
    assert not list((small_catalog.folder / "locations").glob("part*"))


def test_huge_samples_are_refused(small_catalog):
    def enlarge(table):
        sizes = table.column("image_bytes").to_pylist()
        sizes[7] = 2**31
        at = table.schema.get_field_index("image_bytes")
        return table.set_column(at, table.schema.field(at), [sizes])

    spoil(small_catalog, enlarge)
    with pytest.raises(UserError, match="2147483648"):
        ensure_locations(small_catalog, small_catalog.snapshot())


def test_where_nothing_can_be_written(small_catalog):
    (small_catalog.folder / "locations").write_text("in the way")  # as root, permissions don't hold
    with pytest.raises(UserError, match="make the catalog writable"):
        ensure_locations(small_catalog, small_catalog.snapshot())


@pytest.mark.slow
def test_several_processes_at_once(small_catalog):
    context = multiprocessing.get_context("spawn")
    arguments = (small_catalog, small_catalog.snapshot())
    processes = [context.Process(target=ensure_locations, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = Locations(*arguments).of(np.arange(600))
    assert found["image_bytes"].tolist() == [row["image_bytes"] for row in records(small_catalog)]


@pytest.mark.parametrize("group_rows", [1_000_000, 7])
def test_names(small_catalog, group_rows):
    for part in small_catalog.parts():
        path = small_catalog.samples_path(part.number)
        pq.write_table(pq.read_table(path), path, row_group_size=group_rows)
        note_digest(path)
    expected = records(small_catalog)
    rows = [599, 3, 3, 460, 459]
    found = Locations(small_catalog, small_catalog.snapshot()).names(np.array(rows))
    assert found == [(expected[row]["key"], expected[row]["uid"].hex()) for row in rows]


def test_samples_are_written_in_row_groups(small_catalog, tmp_path):
    table = pq.read_table(small_catalog.samples_path(0))
    import pyarrow as pa

    write_table(tmp_path / "long.parquet", pa.concat_tables([table] * 300))
    with pq.ParquetFile(tmp_path / "long.parquet") as file:
        assert file.num_row_groups == 3
        assert file.metadata.row_group(0).num_rows == 65_536
