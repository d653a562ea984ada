import itertools
import json

import pytest

from tailwise.catalog import Catalog, series
from tailwise.catalog.files import write_json
from tailwise.catalog.layout import HEAD, HEADER
from tailwise.catalog.series import Series
from tailwise.errors import UserError
from tailwise.stages.import_pool import import_pool


@pytest.fixture
def three(tmp_path):
    made = Series(tmp_path / "series", required=True)
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


def test_a_changed_head_is_refused_or_says_the_same(three):
    """It says the same where the name of its checksum has changed: older versions wrote none."""
    path = three.folder / HEAD
    content = path.read_bytes()
    refused = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert values(three) == [0, 1, 2]
        except UserError as error:
            refused += 1
            assert HEAD in str(error)
    assert refused >= len(content) - len("checksum")


@pytest.mark.parametrize("number", [4, 5, 999999])
def test_a_surplus_entry_is_refused(three, number):
    write_json(three.path(number), {"value": number, "previous": "0" * 32})
    with pytest.raises(UserError, match=f"{number:06d}.json is not listed"):
        three.read()


def test_an_entry_of_another_history_is_refused(three, tmp_path):
    other = Series(tmp_path / "other", required=True)
    other.begin()
    for value in (0, 1, 7, 8):
        other.append({"value": value})
    three.path(4).write_bytes(other.path(4).read_bytes())
    with pytest.raises(UserError, match=r"000004.json .* does not follow"):
        three.read()


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("stop", range(4))
def test_an_append_that_ends_anywhere_is_whole_or_absent(tmp_path, monkeypatch, stop, required):
    """An append writes the head as it is, the entry, and the head; the process ends before write `stop`."""
    made = Series(tmp_path, required)
    if required:
        made.begin()
    else:  # as an older version wrote it
        write_json(made.path(1), {"value": 0})
    before = values(made)
    writes = itertools.count()

    def dying(write):
        def run(*arguments):
            if next(writes) == stop:
                raise KeyboardInterrupt
            write(*arguments)

        return run

    with monkeypatch.context() as patched:
        for name in ("write_json", "write_record"):
            patched.setattr(series, name, dying(getattr(series, name)))
        if stop < 3:
            with pytest.raises(KeyboardInterrupt):
                made.append({"value": 1})
        else:
            made.append({"value": 1})
    assert values(made) == ([*before, 1] if stop > 1 else before)
    made.append({"value": 2})
    assert values(made) == ([*before, 1, 2] if stop > 1 else [*before, 2])


def test_a_series_of_an_older_version_opens_and_gets_a_head(tmp_path):
    old = Series(tmp_path, required=False)
    for number in (1, 2):
        write_json(old.path(number), {"value": number})
    assert values(old) == [1, 2]
    old.append({"value": 3})
    assert values(old) == [1, 2, 3]
    old.path(1).unlink()
    with pytest.raises(UserError, match=r"000001.json is missing"):
        old.read()


@pytest.fixture
def old(tmp_path):
    """A series of two entries that an older version wrote."""
    made = Series(tmp_path / "old", required=False)
    for value in range(2):
        write_json(made.path(value + 1), {"value": value})
    return made


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_entry_of_an_older_version_is_missed_once_the_series_was_read(old, number):
    assert values(old) == [0, 1]
    assert sorted(path.name for path in old.folder.iterdir()) == [*ENTRIES[:2], HEAD]
    old.path(number).unlink()
    for command in (old.read, old.settle, lambda: old.append({"value": 9})):
        with pytest.raises(UserError, match=rf"{number:06d}\.json is missing"):
            command()


def test_the_head_of_an_older_version_is_not_written_over_that_of_an_append(old):
    checked = old._checked()
    old.append({"value": 2})
    head = (old.folder / HEAD).read_bytes()
    old._adopt(checked[1])  # by a process that looked before the append
    assert (old.folder / HEAD).read_bytes() == head
    assert values(old) == [0, 1, 2]
    assert sorted(path.name for path in old.folder.iterdir()) == [*ENTRIES, HEAD]


def test_a_series_that_cannot_be_written_to_is_read(old, monkeypatch):
    monkeypatch.setattr(series, "write_record", failing)
    assert values(old) == values(old) == [0, 1]


def failing(*_):
    raise PermissionError(13, "Permission denied")


def test_a_gap_in_a_series_without_head_is_refused(tmp_path):
    old = Series(tmp_path, required=False)
    write_json(old.path(2), {"value": 2})
    with pytest.raises(UserError, match=r"000001.json is missing"):
        old.read()


def test_a_series_that_has_lost_its_head_is_refused(tmp_path):
    old = Series(tmp_path, required=False)
    old.append({"value": 1})
    (tmp_path / HEAD).unlink()
    with pytest.raises(UserError, match=r"head.json is missing"):
        old.read()


@pytest.mark.parametrize("name", ["snapshots", "removals"])
def test_a_new_catalog_misses_a_lost_folder(small_catalog, name):
    assert json.loads((small_catalog.folder / HEADER).read_text())["heads"] is True
    for path in (small_catalog.folder / name).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"{name}/head.json is missing"):
        Catalog.open(small_catalog.folder).series(name).read()


def test_a_catalog_of_an_older_version_opens(small_catalog):
    (small_catalog.folder / HEADER).write_text('{"format": 1}')
    for name in ("snapshots", "removals"):
        (small_catalog.folder / name / HEAD).unlink()
    for path in (small_catalog.folder / "snapshots").glob("*.json"):
        entry = json.loads(path.read_text())
        del entry["previous"]
        path.write_text(json.dumps(entry))
    assert Catalog.open(small_catalog.folder).snapshot().rows == 600


def test_what_is_known_is_read_again_once_another_process_has_written(three, tmp_path):
    """Of an append that ends before the head is written, the entry counts too."""
    assert three.known() == three.read()
    three.known()[0]["value"] = "changed by a caller"
    other = Series(three.folder, three.required)
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
