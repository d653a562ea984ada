import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog import removals as module
from tailwise.catalog.removals import NAME_KINDS, NAMES_SCHEMA, NOTHING_REMOVED, Names, Removals
from tailwise.catalog.series import Series
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove
from tailwise.steps.upkeep.status import status
from tailwise.steps.upkeep.verify import verify
from tailwise.storage.local import locked

UIDS = [bytes([digit] * 16) for digit in range(3)]
PATHS = ["/pool/0.tar", "/pool/1.tar"]


@pytest.fixture
def pools(tmp_path, make_pool):
    """Folders "a" (keys 000000000 … of shards 0, 1, 2) and "b" (keys of shards 2, 3: those of 2 clash), and a function that imports."""
    make_pool(tmp_path / "a", [5, 7, 4])
    make_pool(tmp_path / "b", [6, 3], first_shard=2)

    def run(*names, catalog="catalog"):
        for name in names:
            import_pool([str(tmp_path / name)], tmp_path / catalog, workers=1, part_rows=6)
        return Catalog.open(tmp_path / catalog)

    return run


@pytest.fixture
def listed(tmp_path):
    """`listed(*lines)` → a text file of them."""

    def write(*lines):
        path = tmp_path / "names.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def column(catalog, name):
    return [value for part in catalog.parts() for value in catalog.samples(part, [name]).column(0).to_pylist()]


def rows_of(catalog, *keys):
    return [row for row, key in enumerate(column(catalog, "key")) if key in keys]


# --- who is named, against a plain reference -----------------------------------------------------------------------------

names = st.one_of(
    st.tuples(st.sampled_from("abc"), st.none(), st.none()),
    st.tuples(st.none(), st.sampled_from(UIDS), st.none()),
    st.tuples(st.sampled_from("abc"), st.sampled_from(UIDS), st.none()),
    st.tuples(st.sampled_from("abc"), st.none(), st.sampled_from([*PATHS, "/elsewhere.tar"])),
)
people = st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from("abcd"), st.sampled_from(UIDS)), max_size=12)


def table_of(lines):
    columns = list(zip(*lines, strict=True)) or [[], [], []]
    columns += [[None] * len(lines)] * (len(NAMES_SCHEMA) - len(columns))
    return pa.table([pa.array(list(values), field.type) for values, field in zip(columns, NAMES_SCHEMA, strict=True)],
                    schema=NAMES_SCHEMA)  # fmt: skip


def respects(line):
    """What a line says: key, uid, shard and key; None where it doesn't."""
    key, uid, shard = line
    return (key if shard is None else None), uid, (None if shard is None else (shard, key))


@settings(deadline=None)
@given(st.lists(names, max_size=8), people)
def test_names_find_whom_they_name(lines, samples):
    shards, keys, uids = zip(*samples, strict=True) if samples else ([], [], [])
    table = pa.table(
        {
            "shard": pa.array(shards, pa.int32()),
            "key": pa.array(keys, pa.string()),
            "uid": pa.array(uids, pa.binary(16)),
        }
    )
    given = Names.given(table_of(lines), pa.array(PATHS))
    *found, by_id, by_path, url, sha256, md5 = given.lines_of(
        table, pa.array(PATHS[::-1])
    )  # the paths have changed since
    assert all((others == -1).all() for others in (by_path, url, sha256, md5))
    found.append(by_id)
    for kind, mine in enumerate(found):
        for at, (shard, key, uid) in enumerate(samples):
            said = (key, uid, (PATHS[shard], key))[kind]
            assert mine[at] == next((n for n, line in enumerate(lines) if respects(line)[kind] == said), -1)
    counts = np.zeros((NAME_KINDS, len(lines)), np.int64)
    for count, mine in zip(counts, found, strict=False):
        np.add.at(count, mine[mine >= 0], 1)
    for line, number in zip(lines, given.samples_of(counts).tolist(), strict=True):
        said = respects(line)
        each = [
            sum((key, uid, (PATHS[shard], key))[kind] == said[kind] for shard, key, uid in samples) for kind in range(3)
        ]
        assert number == max(each)


@settings(deadline=None)
@given(st.lists(names, max_size=8), st.lists(names, max_size=8))
def test_a_line_is_new_if_it_says_anything_new(lines, others):
    known = [set(), set(), set()]
    for other in others:
        for have, said in zip(known, respects(other), strict=True):
            have.add(said)
    expected = []
    for line in lines:
        said = respects(line)
        if any(value is not None and value not in have for value, have in zip(said, known, strict=True)):
            expected.append(line)
        for have, value in zip(known, said, strict=True):
            have.add(value)
    paths = pa.array(PATHS)
    new = Names.given(table_of(lines), paths).unknown_to(Names.given(table_of(others), paths))
    assert new.table.drop_columns(["shard_id"]).to_pylist() == table_of(expected).to_pylist()


# --- of a catalog --------------------------------------------------------------------------------------------------------


def test_nothing_is_removed_from_a_fresh_catalog(pools):
    catalog = pools("a")
    found = Removals.of(catalog)
    assert found is NOTHING_REMOVED
    assert found.id is None
    assert found.keeps(slice(3, 9)).tolist() == [True] * 6
    assert found.keeps(np.array([15, 0])).tolist() == [True] * 2
    assert found.removal_of(3) is None
    assert [path.name for path in (catalog.folder / "removals").iterdir()] == ["head.json"]


def test_keys_and_uids_a_line(pools, tmp_path):
    catalog = pools("a")
    uids = [uid.hex() for uid in column(catalog, "uid")]
    path = tmp_path / "names.TXT"
    path.write_bytes(f"\ufeff000000002\r\n\r\n  {uids[7].upper()}\n{uids[7]}\nnobody".encode())
    report = remove(catalog, path, reason="opt-out")
    assert (report.number, report.names, report.repeated, report.removed, report.unknown) == (1, 4, 0, 2, ["nobody"])
    assert (report.removed_before, report.several, report.of_several, report.removed_in_all) == (0, 0, 0, 2)
    found = Removals.of(catalog)
    assert found.rows.tolist() == [2, 7]
    assert found.keeps(slice(2, 9)).tolist() == [False, True, True, True, True, False, True]
    assert found.keeps(np.array([7, 0, 7, 2, 15])).tolist() == [False, True, False, False, True]
    assert found.removal_of(7).reason == "opt-out"
    assert len(found.removal_of(2).date) == 10
    assert found.removal_of(3) is None


def test_a_key_of_several_samples_removes_them_all_and_one_with_a_shard_does_not(pools, listed, tmp_path):
    catalog = pools("a", "b")
    both = rows_of(catalog, "000020001")
    assert len(both) == 2
    pairs = pa.table({"shard": [str(tmp_path / "b" / "00002.tar"), "/nowhere.tar"], "key": ["000020002", "000020003"]})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    report = remove(catalog, tmp_path / "pairs.parquet")
    assert (report.removed, report.several, report.unknown) == (1, 0, ["/nowhere.tar 000020003"])
    assert Removals.of(catalog).rows.tolist() == rows_of(catalog, "000020002")[1:]
    report = remove(catalog, listed("000020001", "000000000"))
    assert (report.removed, report.several, report.of_several) == (3, 1, 2)
    report = remove(catalog, listed("000020002"))  # all of that name, now
    assert (report.removed, report.removed_before, report.repeated) == (1, 1, 0)
    found = Removals.of(catalog)
    assert found.rows.tolist() == sorted([*both, *rows_of(catalog, "000020002"), 0])
    assert [found.removal_of(row).number for row in rows_of(catalog, "000020002")] == [3, 1]


@pytest.mark.parametrize("kind", ["hex", "bytes", "key"])
def test_parquet_names_by_uid_or_key(pools, tmp_path, kind):
    catalog = pools("a")
    uids = column(catalog, "uid")
    columns = {
        "hex": {"uid": [uids[9].hex(), "0" * 32], "key": ["000000000"] * 2},
        "bytes": {"uid": pa.array([uids[9], b"0" * 16], pa.binary(16))},
        "key": {"key": [column(catalog, "key")[9], "none"], "copies": [1, 2]},
    }
    pq.write_table(pa.table(columns[kind]), tmp_path / "names.parquet")
    assert len(remove(catalog, tmp_path / "names.parquet").unknown) == 1
    assert Removals.of(catalog).rows.tolist() == [9]  # uids, where there are any: they are more precise


def test_it_makes_no_difference_when_the_samples_came(pools, listed):
    """Removed before, between and behind imports: the same rows, reasons and hash."""
    lines = ["000020001"], ["000030002", "000000003", "000020000"]
    results = []
    for name, order in {"x": "a0b1", "y": "a01b", "z": "ab01"}.items():
        catalog = None
        for step in order:
            if step in "ab":
                catalog = pools(step, catalog=name)
            else:
                remove(catalog, listed(*lines[int(step)]), reason=f"reason {step}")
        found = Removals.of(catalog)
        results.append((found.rows.tolist(), found.numbers.tolist(), found.id))
        again = Removals.of(Catalog.open(catalog.folder))
        assert (again.rows.tolist(), again.numbers.tolist(), again.id) == results[-1]
    assert results[0] == results[1] == results[2]
    assert results[0][0] == rows_of(catalog, "000020001", "000030002", "000000003", "000020000")
    assert sorted(set(results[0][1])) == [1, 2]


def test_unknown_keys_are_remembered(pools, listed):
    catalog = pools("a")
    report = remove(catalog, listed("000030001"))
    assert (report.number, report.removed, report.unknown) == (1, 0, ["000030001"])
    assert Removals.of(catalog).id is None
    catalog = pools("b")
    assert Removals.of(catalog).rows.tolist() == rows_of(catalog, "000030001") != []
    before = catalog.snapshot(1)
    assert Removals.of(catalog, before).rows.tolist() == []
    assert Removals.of(catalog, before).id is None
    assert remove(catalog, listed("000030001")).known == 1


def test_a_shard_that_moves_keeps_its_removals(pools, tmp_path, listed):
    catalog = pools("a", "b")
    path = catalog.shards().column("path").to_pylist()[3]
    pairs = pa.table({"shard": [path, str(tmp_path / "c" / "00009.tar")], "key": ["000020001", "000090000"]})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    remove(catalog, tmp_path / "pairs.parquet")
    before = Removals.of(catalog).rows.tolist()
    assert len(before) == 1
    (tmp_path / "b").rename(tmp_path / "moved")
    catalog.relocate(str(tmp_path / "b"), str(tmp_path / "moved"))
    for found in (catalog.folder / "removals" / "found").glob("*"):
        found.unlink()
    assert Removals.of(catalog).rows.tolist() == before
    assert remove(catalog, listed("000000000")).removed == 1


def test_a_damaged_list_of_rows_is_not_believed(pools, listed):
    catalog = pools("a")
    remove(catalog, listed("000000001"))
    (path,) = (catalog.folder / "removals" / "found").glob("*.npy")
    rows = np.load(path)
    rows[0] += 1
    np.save(path, rows)
    assert Removals.of(catalog).rows.tolist() == rows_of(catalog, "000000001")


def test_doing_it_again_changes_nothing(pools, listed, tree_bytes):
    catalog = pools("a")
    remove(catalog, listed("000000001", "none"))
    before = tree_bytes(catalog.folder)
    report = remove(catalog, listed("none", "000000001", "none"), reason="another")
    assert (report.number, report.repeated, report.known, report.removed, report.unknown) == (None, 1, 2, 0, [])
    assert report.removed_in_all == 1
    assert tree_bytes(catalog.folder) == before


def test_a_dry_run_tells_the_same_and_writes_nothing(pools, listed, tree_bytes):
    catalog = pools("a")
    before = tree_bytes(catalog.folder)
    told = remove(catalog, listed("000000001", "none"), dry_run=True).as_json()
    assert tree_bytes(catalog.folder) == before
    assert told.pop("number") is None
    done = remove(catalog, listed("000000001", "none")).as_json()
    assert done.pop("number") == 1
    assert told == done


def test_an_interrupted_removal_is_none_and_can_be_repeated(pools, listed, interrupted):
    catalog = pools("a")
    remove(catalog, listed("000000001"))
    with interrupted(Series, "append"):
        remove(catalog, listed("000000002"))
    assert Removals.of(catalog).rows.tolist() == [1]
    assert remove(catalog, listed("000000003")).number == 2
    assert Removals.of(catalog).rows.tolist() == [1, 3]


@pytest.mark.parametrize("harm", ["lost", "cut", "unwritable", "interrupted"])
def test_what_was_found_is_found_again(pools, listed, harm, interrupted):
    """The rows are worked out anew from the names; so they are where the catalog can't be written to."""
    catalog = pools("a", "b")
    remove(catalog, listed("000000001", "000020001"))
    if harm == "interrupted":
        with interrupted(module, "_keep"):
            remove(catalog, listed("000030000"))
    else:
        remove(catalog, listed("000030000"))
    folder = catalog.folder / "removals" / "found"
    for path in folder.glob("*"):
        if harm == "cut" and path.suffix == ".npy":
            path.write_bytes(path.read_bytes()[:-9])
        elif harm in {"lost", "unwritable"}:
            path.unlink()
    if harm == "unwritable":
        folder.rmdir()
        folder.write_text("no folder can be here")
    found = Removals.of(catalog)
    assert found.rows.tolist() == rows_of(catalog, "000000001", "000020001", "000030000")
    assert [found.removal_of(row).number for row in rows_of(catalog, "000000001", "000030000")] == [1, 2]
    if harm != "unwritable":
        assert verify(catalog)[1] == []


def test_only_new_parts_are_searched_after_an_import(pools, listed):
    """Old parts' files may even be gone: their rows are known."""
    catalog = pools("a")
    remove(catalog, listed("000000001", "000030001"))
    catalog = pools("b")
    away = catalog.samples_path(0).with_suffix(".away")
    catalog.samples_path(0).rename(away)
    rows = Removals.of(catalog).rows.tolist()
    away.rename(catalog.samples_path(0))
    assert rows == rows_of(catalog, "000000001", "000030001")


def test_one_at_a_time(pools, listed):
    catalog = pools("a")
    folder = catalog.folder / "removals"
    with locked(folder / ".lock", "it"), pytest.raises(UserError, match=r"another process is writing .*removals"):
        remove(catalog, listed("000000001"))


def test_status_and_verify_know_them(pools, listed):
    catalog = pools("a")
    assert status(catalog)["removed"] == []
    count, _ = verify(catalog)
    remove(catalog, listed("000000001", "none", "000010002"), reason="takedown 7")
    remove(catalog, listed("000000001", "000000002"))
    told = [
        {key: item[key] for key in ("removal", "reason", "names", "samples")} for item in status(catalog)["removed"]
    ]
    assert told == [
        {"removal": 1, "reason": "takedown 7", "names": 3, "samples": 2},
        {"removal": 2, "reason": "on request", "names": 1, "samples": 1},
    ]
    assert verify(catalog) == (count + 2 + 2, [])  # names; the rows and their marker
    path = catalog.folder / "removals" / "000001.parquet"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    assert verify(catalog)[1] == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no sample: give a key, uid, url or hash a line"),
        (b"\r\n\n", "names no sample"),
        (b"caf\xe9\n", "can't be read as a list of keys: it is not UTF-8 text"),
    ],
)
def test_bad_text_is_refused(pools, tmp_path, content, message):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        remove(pools("a"), tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"shard": ["x"], "name": ["y"]},
            "needs the column uid, or key, or key and shard, or url, sha256 or md5; it has shard, name",
        ),
        ({"uid": ["12"]}, "the uid '12' is none: give 32 hexadecimal digits, or 16 bytes"),
        ({"uid": [b"12"]}, "the uid b'12' is none"),
        ({"key": ["a", None]}, "row 1 of .* has no key"),
        ({"key": [7]}, "the key 7 is no text"),
        ({"key": ["a"], "shard": [0]}, "the shard 0 is no text: give the shard's path"),
        ({"key": pa.array([], pa.string())}, "names no sample"),
    ],
)
def test_bad_parquet_is_refused(pools, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "names.parquet")
    with pytest.raises(UserError, match=message):
        remove(pools("a"), tmp_path / "names.parquet")


def test_other_mistakes(pools, tmp_path, listed):
    catalog = pools("a")
    (tmp_path / "names.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="can't be read as Parquet"):
        remove(catalog, tmp_path / "names.parquet")
    with pytest.raises(UserError, match=r"absent.txt is no file: give a .txt"):
        remove(catalog, tmp_path / "absent.txt")
    (tmp_path / "names.pdf").write_text("000000001")
    with pytest.raises(UserError, match=r"keys are read from a file ending in \.txt or \.parquet, \.csv"):
        remove(catalog, tmp_path / "names.pdf")
    with pytest.raises(UserError, match="`reason` is empty"):
        remove(catalog, listed("000000001"), reason=" ")
    with pytest.raises(UserError, match="holds no samples"):
        remove(Catalog.create(tmp_path / "empty"), listed("000000001"))


def test_the_command(run_tailwise, pools, listed):
    catalog = pools("a", "b")

    command = ["remove", str(catalog.folder), "--keys"]

    def run(*arguments):
        result = CliRunner().invoke(app, [*command, *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    path = str(listed("000020001", "000000001", "none"))
    assert "3 samples would be removed; 3 of the catalog" in run(path, "--dry-run")
    told = run(path, "--reason", "opt-out")
    assert "3 samples removed; 3 of the catalog are removed in all" in told
    assert "1 names belong to several samples: all 2 of these removed" in told
    assert "1 names belong to no sample, and are remembered for later imports: none" in told
    assert "3 of 3 names were given before" in run(path)
    assert '"removed_in_all": 3' in run(path, "--json")
    wrong = run_tailwise(*command, "absent.txt", code=2)
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("tailwise: absent.txt is no file")


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_removal_is_refused_by_every_command(pools, listed, tmp_path, lost):
    """Removed samples would come back otherwise: of any entry, also the newest one."""
    catalog = pools("a")
    for key in ("000000001", "000010002"):
        remove(catalog, listed(key))
    make_plan(catalog, "p", PlanRequest("random", keep=0.5))
    (catalog.folder / "removals" / f"{lost:06d}.json").unlink()
    commands = [
        ["verify"],
        ["draw", "p", "--epoch", "0", "--output", str(tmp_path / "drawn.parquet")],
        ["export", "p", str(tmp_path / "exported"), "--to", "keys", "--epoch", "0"],
        ["plan", "another", "--method", "random", "--keep", "0.5"],
    ]
    for command, *options in commands:
        found = CliRunner().invoke(app, [command, str(catalog.folder), *options])
        text = found.output + str(found.exception)
        assert found.exit_code, command
        assert f"removals/{lost:06d}.json is missing" in text.replace("\n", ""), command
    assert not (tmp_path / "exported").exists()
    assert not (tmp_path / "drawn.parquet").exists()
    assert not (catalog.folder / "plans" / "another" / "manifest.json").exists()
