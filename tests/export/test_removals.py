"""Exports and removals: what an export lists can be removed, and nothing that was removed meanwhile is published."""

from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.removals import Removals
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.export import export
from tailwise.requests import ExportRequest, PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove

KEYS = [
    "plain",
    " lead",
    "lead",
    "trail ",
    "\tfirst",
    "#x",
    '"x"',
    '\\"x"',
    "a\\n",
    "\ufeffbom",
    "nel\u0085",
    "ls\u2028",
]
KEYS += ["fs\x1c", "e\u0301", "é", "0" * 32]


@pytest.fixture
def odd(tmp_path, make_tar, make_image):
    """A catalog of samples with KEYS."""
    members = [member for key in KEYS for member in ((f"{key}.jpg", make_image()), (f"{key}.txt", b"x"))]
    make_tar(tmp_path / "pool" / "00000.tar", members)
    return import_pool(tmp_path / "pool", tmp_path / "catalog", workers=1).catalog


def test_an_export_of_keys_fed_back_leaves_nothing(odd, tmp_path):
    there = [key for part in odd.parts() for key in odd.samples(part, ["key"]).column(0).to_pylist()]
    assert there == KEYS
    plan = make_plan(odd, "p", PlanRequest("random", keep=1.0))
    export(plan, "keys", tmp_path / "keys.txt")
    report = remove(odd, tmp_path / "keys.txt")
    assert (report.removed, report.unknown, report.ambiguous) == (len(there), [], [])
    assert export(plan, "keys", tmp_path / "keys.txt", overwrite=True) == 0


@pytest.mark.parametrize("key", [" lead", "lead", "trail ", '"x"', "#x"])
def test_a_key_removes_itself_and_nothing_else(odd, tmp_path, key):
    (tmp_path / "keys.txt").write_text(f"{key}\n")
    assert remove(odd, tmp_path / "keys.txt").removed == 1
    (row,) = Removals.of(odd).rows.tolist()
    assert odd.samples(odd.parts()[0], ["key"]).column(0)[row].as_py() == key


def test_a_key_that_is_the_uid_of_another_sample(tmp_path, make_tar, make_image):
    uid = "0123456789abcdef" * 2
    members = [(f"{uid}.jpg", make_image()), (f"{uid}.txt", b"x"), ("b.jpg", make_image()), ("b.txt", b"x")]
    make_tar(tmp_path / "pool" / "00000.tar", [*members, ("b.json", f'{{"uid": "{uid}"}}'.encode())])
    catalog = import_pool(tmp_path / "pool", tmp_path / "catalog", workers=1).catalog
    (tmp_path / "keys.txt").write_text(f"{uid}\n")
    report = remove(catalog, tmp_path / "keys.txt")
    assert (report.removed, report.ambiguous) == (1, [uid])
    assert remove(catalog, tmp_path / "keys.txt").number is None
    pq.write_table(pa.table({"uid": [uid]}), tmp_path / "uids.parquet")
    assert remove(catalog, tmp_path / "uids.parquet").removed == 1


@pytest.mark.parametrize("format_name", ["parquet", "shards"])
@pytest.mark.parametrize("at", [0, 1])
def test_what_is_removed_meanwhile_is_not_published(mixed, tmp_path, format_name, at):
    """The removal comes before part `at` is drawn. (Keys clash in this pool, and some have no uid; other formats come below.)"""
    plan = make_plan(mixed, "p", PlanRequest("random", keep=1.0))
    uids = [uid.hex() for part in mixed.parts() for uid in mixed.samples(part, ["uid"]).column(0).to_pylist()]
    (tmp_path / "uids.txt").write_text(f"{uids[3]}\n{uids[-3]}\n")
    output = tmp_path / "out"

    def removing(items, *_):
        for number, item in enumerate(items):
            if number == at and not Removals.of(mixed).id:
                remove(mixed, tmp_path / "uids.txt")
            yield item

    if format_name == "shards":
        with pytest.raises(UserError, match="samples were removed from the catalog while"):
            export(plan, format_name, output, context=Context(removing))
        assert {path.name for path in output.iterdir()} <= {".lock"}
        export(plan, format_name, output)
        return
    export(plan, format_name, output, context=Context(removing))  # is written again
    written = {
        uid.hex() if isinstance(uid, bytes) else uid for uid in pq.read_table(output).column("uid").to_pylist() if uid
    }
    assert not written & {uids[3], uids[-3]}
    assert len(written) > 3


def test_only_its_own_files_are_deleted(mixed, tmp_path):
    """Files that an earlier, interrupted run of the export wrote go as well."""
    plan = make_plan(mixed, "p", PlanRequest("random", keep=1.0))
    uids = [uid.hex() for part in mixed.parts() for uid in mixed.samples(part, ["uid"]).column(0).to_pylist()]
    output, sharding = tmp_path / "out", ExportRequest(shard_samples=40, workers=1)
    foreign = ("00000099.tar", "notes.txt", "00000000.txt", "0.tar")

    def interrupted(items, description="", *_):
        yield from islice(items, 1 if description == "writing shards" else None)
        if description == "writing shards":
            raise KeyboardInterrupt

    def removing(number):
        def track(items, description="", *_):
            yield from items
            if description == "writing shards":
                (tmp_path / "uids.txt").write_text(uids[number])
                remove(mixed, tmp_path / "uids.txt")

        return track

    with pytest.raises(KeyboardInterrupt):
        export(plan, "shards", output, request=sharding, context=Context(interrupted))
    assert (output / "00000000.tar").exists()
    for name in foreign:
        (output / name).write_text("mine")
    with pytest.raises(UserError, match="samples were removed from the catalog while"):
        export(plan, "shards", output, request=sharding, context=Context(removing(3)))
    assert {path.name for path in output.iterdir()} - {".lock"} == set(foreign)
    for name in foreign:
        (output / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        export(plan, "shards", output, request=sharding, context=Context(interrupted))
    (tmp_path / "uids.txt").write_text(uids[5])
    remove(mixed, tmp_path / "uids.txt")
    with pytest.raises(KeyboardInterrupt):  # begun again from its first shard
        export(plan, "shards", output, request=sharding, context=Context(interrupted))
    assert [path.name for path in output.glob("*.tar")] == ["00000000.tar"]
    written = pq.read_table(output / "00000000.parquet").column("uid").to_pylist()
    export(plan, "shards", output, request=sharding)
    every = [uid for path in sorted(output.glob("0*.parquet")) for uid in pq.read_table(path).column("uid").to_pylist()]
    assert every[: len(written)] == written
    assert sorted(every) == sorted(set(uids) - {uids[3], uids[5]})


@pytest.fixture
def named(tmp_path, make_tar, make_image):
    """A catalog of two parts, whose samples have keys and uids of their own."""
    for shard in range(2):
        members = []
        for key in range(2 * shard, 2 * shard + 2):
            members += [(f"{key:06d}.jpg", make_image()), (f"{key:06d}.json", f'{{"uid": "{key:032x}"}}'.encode())]
            members.append((f"{key:06d}.txt", b"x"))
        make_tar(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return import_pool(tmp_path / "pool", tmp_path / "catalog", workers=1, part_rows=2).catalog


@pytest.mark.parametrize("format_name", ["keys", "rates-json", "parquet", "datacomp"])
def test_samples_that_are_removed_meanwhile_are_not_in_the_file(named, tmp_path, format_name):
    plan = make_plan(named, "p", PlanRequest("random", keep=1.0))
    (tmp_path / "keys.txt").write_text("000000\n000003\n")
    output = tmp_path / "out"
    export(plan, format_name, output)
    before = output.read_bytes()

    def removing(items, *_):
        for number, item in enumerate(items):
            if number == 1:
                remove(named, tmp_path / "keys.txt")
            yield item

    export(plan, format_name, output, overwrite=True, context=Context(removing))
    assert output.read_bytes() != before
    export(plan, format_name, tmp_path / "again")
    assert output.read_bytes() == (tmp_path / "again").read_bytes()


def test_removals_without_end_leave_the_old_file(named, tmp_path):
    plan = make_plan(named, "p", PlanRequest("random", keep=1.0))
    output = tmp_path / "out"
    export(plan, "keys", output)
    before, left = output.read_bytes(), ["000000", "000001", "000002"]

    def removing(items, *_):
        if left:
            (tmp_path / "keys.txt").write_text(left.pop())
            remove(named, tmp_path / "keys.txt")
        return items

    with pytest.raises(UserError, match="run this command again"):
        export(plan, "keys", output, overwrite=True, context=Context(removing))
    assert (output.read_bytes(), left) == (before, [])
