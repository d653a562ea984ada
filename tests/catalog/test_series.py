import itertools

import pytest

from tailwise.catalog import Catalog, series
from tailwise.catalog.files import write_record
from tailwise.catalog.layout import HEAD, HEADER
from tailwise.catalog.series import Series
from tailwise.errors import ConflictError, UnsupportedError, UserError
from tailwise.steps.importing.pool import import_pool
from tailwise.storage.local_store import LocalStore


@pytest.fixture
def three(tmp_path):
    made = Series(tmp_path / "series")
    made.begin()
    for value in range(3):
        made.append({"value": value})
    return made


def values(of):
    return [entry["value"] for entry in of.read()]


def test_entries_come_back_in_order(three):
    assert three.read() == [{"value": 0}, {"value": 1}, {"value": 2}]
    assert three.append({"value": 3}) == 4
    assert values(three) == [0, 1, 2, 3]


ENTRIES = ["000001.json", "000002.json", "000003.json"]


@pytest.mark.parametrize(
    "lost", [names for count in range(1, 5) for names in itertools.combinations([*ENTRIES, HEAD], count)]
)
def test_whatever_is_lost_is_missed_and_nothing_is_written_over(three, lost, tree_bytes):
    for name in lost:
        (three.folder / name).unlink()
    left = tree_bytes(three.folder)
    for command in (three.read, lambda: three.append({"value": 9})):
        with pytest.raises(UserError, match=r"is missing.*restore the folder series"):
            command()
    assert tree_bytes(three.folder) == left


@pytest.mark.parametrize("name", ENTRIES)
def test_a_changed_entry_is_refused_by_name(three, name):
    path = three.folder / name
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match=name):
            three.read()


def test_a_changed_head_is_refused(three):
    path = three.folder / HEAD
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError, match=HEAD):
            three.read()


@pytest.mark.parametrize("number", [4, 5, 999999])
def test_a_surplus_entry_is_refused(three, number):
    write_record(three.path(number), {"value": number, "previous": "0" * 32})
    with pytest.raises(UserError, match=f"{number:06d}.json is not listed"):
        three.read()


def test_an_entry_of_another_history_is_refused(three, tmp_path):
    other = Series(tmp_path / "other")
    other.begin()
    for value in (0, 1, 7, 8):
        other.append({"value": value})
    three.path(4).write_bytes(other.path(4).read_bytes())
    with pytest.raises(UserError, match=r"000004.json .* does not follow"):
        three.read()


@pytest.mark.parametrize("stop", range(3))
def test_an_append_that_ends_anywhere_is_whole_or_absent(tmp_path, monkeypatch, stop):
    """An append writes the entry, and the head; the process ends before write `stop`."""
    made = Series(tmp_path)
    made.begin()
    made.append({"value": 0})
    writes = itertools.count()

    def dying(write):
        def run(*arguments):
            if next(writes) == stop:
                raise KeyboardInterrupt
            return write(*arguments)

        return run

    with monkeypatch.context() as patched:
        for name in ("put_if_absent", "replace_if"):
            patched.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
        if stop < 2:
            with pytest.raises(KeyboardInterrupt):
                made.append({"value": 1})
        else:
            made.append({"value": 1})
    assert values(made) == ([0, 1] if stop else [0])
    made.append({"value": 2})
    assert values(made) == ([0, 1, 2] if stop else [0, 2])


def test_of_two_that_append_at_once_one_is_refused(tmp_path, monkeypatch):
    made = Series(tmp_path)
    made.begin()
    checked = Series._checked

    def slow(self):
        found = checked(self)
        monkeypatch.undo()
        made.append({"value": "first"})
        return found

    monkeypatch.setattr(Series, "_checked", slow)
    with pytest.raises(ConflictError, match=r"another process has written .*000001\.json at this moment"):
        made.append({"value": "second"})
    assert values(made) == ["first"]


def test_a_series_that_has_lost_its_head_is_refused(tmp_path):
    made = Series(tmp_path)
    made.begin()
    made.append({"value": 1})
    (tmp_path / HEAD).unlink()
    with pytest.raises(UserError, match=r"head.json is missing"):
        made.read()


@pytest.mark.parametrize("name", ["snapshots", "removals"])
def test_a_new_catalog_misses_a_lost_folder(small_catalog, name):
    for path in (small_catalog.folder / name).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"{name}/head.json is missing"):
        Catalog.open(small_catalog.folder).series(name).read()


def test_a_catalog_of_an_older_version_is_refused_in_one_line(small_catalog):
    (small_catalog.folder / HEADER).write_text('{"format": 1}')
    with pytest.raises(
        UnsupportedError, match="has catalog format 1, this tailwise reads 2: import the pool into a new"
    ):
        Catalog.open(small_catalog.folder)


def test_what_is_known_is_read_again_once_another_process_has_written(three, tmp_path):
    """Of an append that ends before the head is written, the entry counts too."""
    assert three.known() == three.read()
    three.known()[0]["value"] = "changed by a caller"
    other = Series(three.folder)
    assert [entry["value"] for entry in three.known()] == [0, 1, 2]
    head = (three.folder / HEAD).read_bytes()
    other.append({"value": 3})
    assert [entry["value"] for entry in three.known()] == [0, 1, 2, 3]
    (three.folder / HEAD).write_bytes(head)
    assert [entry["value"] for entry in three.known()] == [0, 1, 2, 3]
    three.path(2).unlink()
    with pytest.raises(UserError, match=r"000002.json is missing"):
        three.known()


def test_an_import_reads_each_state_of_the_snapshots_once(tmp_path, make_pool):
    make_pool(tmp_path / "pool", [20, 20])
    before = series._entries.cache_info().misses
    catalog = import_pool(str(tmp_path / "pool"), tmp_path / "catalog", workers=1).catalog
    assert series._entries.cache_info().misses - before <= 4  # without and with its snapshot; removals
    before = series._entries.cache_info().misses
    for _ in range(3):
        assert Catalog.open(catalog.folder).parts()[0].rows == 40
    assert series._entries.cache_info().misses == before
