"""Removed samples: training on a plan made before replaces them, and nothing of them is read."""

import json
import logging
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tailwise.catalog.removals import Removals
from tailwise.export import export
from tailwise.loader.loader import Loader
from tailwise.loader.substitutes import Substitutes
from tailwise.loader.webdataset import select
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.shards.fingerprint import BLOCK_BYTES
from tailwise.shards.verify import check_shards
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.relocate import relocate
from tailwise.steps.upkeep.remove import remove

OPTIONS = {"lanes": 8, "block": 40, "batch_size": 16}
REQUESTS = {
    "stream": PlanRequest("flat", keep=0.5),
    "ranked": PlanRequest("ssp", keep=0.6, pick="hardest"),
    "often": PlanRequest("flat", keep=1.5, max_repeats=20),
    "all": PlanRequest("proportional", keep=1.0),
}


@pytest.fixture
def take(tmp_path):
    """`take(catalog, rows)` removes rows; keys are rows here."""

    def run(catalog, rows, reason="opt-out"):
        (tmp_path / "keys.txt").write_text("".join(f"{row:06d}\n" for row in rows))
        assert remove(catalog, tmp_path / "keys.txt", reason=reason).removed == len(rows)

    return run


def read(loader, batches):
    found = iter(loader)
    batches = [next(found) for _ in range(batches)]
    loader.close()
    return batches


def rows_of(batches):
    return torch.cat([batch.rows for batch in batches]).numpy()


def every_tenth(plan, more=()):
    """One of ten rows, so that all shards lose some, and all of shard 5."""
    first, last = plan.shard_offsets[5:7].tolist()
    return sorted({*range(3, 1000, 10), *range(first, last), *more})


@pytest.mark.parametrize("name", REQUESTS)
def test_removed_samples_are_replaced_and_the_order_stays(own_pool, tmp_path, take, name, caplog):
    """Even with on_damaged="error" and no replacement allowed: removal is no damage."""
    plan = make_plan(own_pool, "p", REQUESTS[name])
    options = {**OPTIONS, "max_replaced": 0.0}
    before = rows_of(read(Loader(plan, **options), 60))
    gone = every_tenth(plan)
    take(own_pool, gone, "opt-out of may")
    log = tmp_path / "replaced.jsonl"
    loader = Loader(plan, log=log, **options)
    batches = read(loader, 60)
    after = rows_of(batches)
    lost = np.isin(before, gone)
    assert lost.sum() > 60
    assert not np.isin(after, gone).any()
    assert np.array_equal(after[~lost], before[~lost])
    replaced = [item for batch in batches for item in batch.replaced]
    assert [item.position for item in replaced] == np.flatnonzero(lost).tolist()
    assert {item.reason for item in replaced} == {"removed: opt-out of may"}
    assert [item.row for item in replaced] == before[lost].tolist()
    assert [item.stand_in for item in replaced] == after[lost].tolist()
    assert [text for batch in batches for text in batch.texts] == [f"caption {row}" for row in after]
    assert loader.replaced == len(replaced)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"{row:06d}" for row in before[lost]]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_their_bytes_may_be_gone(own_pool, tmp_path, take):
    """They aren't read: a tar from which they were wiped will do."""
    plan = make_plan(own_pool, "p", REQUESTS["all"])
    first, last = plan.shard_offsets[6:8].tolist()
    gone = list(range(first + 4, last, 2))
    Loader(plan, **OPTIONS).close()  # locations are noted
    path = tmp_path / "pool" / "00006.tar"
    with tarfile.open(path) as tar, path.open("r+b") as stream:
        for item in tar.getmembers():
            if int(item.name[:6]) in gone:
                stream.seek(item.offset_data)
                stream.write(b"\xff" * item.size)
    take(own_pool, gone)
    loader = Loader(plan, transform=lambda image: torch.tensor(image.size), max_replaced=0.0, **OPTIONS)
    assert {item.reason for batch in read(loader, 62) for item in batch.replaced} == {"removed: opt-out"}


def test_a_tar_from_which_they_were_wiped_is_still_compared(own_pool, tmp_path, take):
    """Their blocks are skipped alone, by every command that compares tars."""
    path = tmp_path / "pool" / "00001.tar"
    first = 1  # row of the catalog
    with tarfile.open(path) as tar:
        spans = {item.name: (item.offset_data, item.size) for item in tar.getmembers()}
    size = path.stat().st_size
    assert size > 2 * BLOCK_BYTES

    def write(row, content):
        with path.open("r+b") as stream:
            for suffix in ("jpg", "txt"):
                start, length = spans[f"{row:06d}.{suffix}"]
                stream.seek(start)
                stream.write(content * length)

    take(own_pool, [first, first + 1])
    write(first, b"\xff")
    for check in ("size", "index"):
        assert check_shards(own_pool, own_pool.snapshot(), check) == []
    report = import_pool([str(tmp_path / "pool")], own_pool.folder, workers=1)
    assert (report.new_shards, report.new_samples) == (0, 0)
    shutil.move(tmp_path / "pool", tmp_path / "moved")
    assert relocate(own_pool, str(tmp_path / "pool"), str(tmp_path / "moved")) == 24
    path = tmp_path / "moved" / "00001.tar"
    write(first + 89, b"\xff")  # not removed
    (damage,) = check_shards(own_pool, own_pool.snapshot(), "index")
    assert (damage.path, damage.reason) == (str(path), "other content than when it was imported")
    take(own_pool, [first + 89])
    assert check_shards(own_pool, own_pool.snapshot(), "index") == []


def test_remote_shards_are_not_asked_for_them(own_pool, take):
    plan = make_plan(own_pool, "p", REQUESTS["all"])
    gone = every_tenth(plan)
    take(own_pool, gone)
    loader = Loader(plan, **OPTIONS)
    rows = np.arange(1000)
    wanted, kept = loader._dataset._ranges(rows), loader._dataset._ranges(np.setdiff1d(rows, gone))
    assert np.array_equal(wanted, kept)
    assert loader._dataset._ranges(np.array(gone)).shape == (0, 3)
    loader.close()


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (4, 0), (2, 1)])
def test_the_same_whatever_the_ranks_and_workers(own_pool, take, ranks, workers):
    plan = make_plan(own_pool, "p", REQUESTS["stream"])
    take(own_pool, every_tenth(plan))
    whole = read(Loader(plan, **OPTIONS), 30)
    options = {**OPTIONS, "batch_size": 16 // ranks, "transform": lambda image: torch.tensor(image.size)}
    loaders = [Loader(plan, rank=rank, world_size=ranks, workers=workers, **options) for rank in range(ranks)]
    parts = [read(loader, 30) for loader in loaders]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[number].rows for part in parts]), batch.rows)
        assert [item for part in parts for item in part[number].replaced] == batch.replaced


def test_a_training_that_goes_on_behind_a_removal(own_pool, take):
    """The state is of the same order, and a loader made before keeps what it knew."""
    plan = make_plan(own_pool, "p", REQUESTS["stream"])
    whole = rows_of(read(Loader(plan, **OPTIONS), 60))
    first = Loader(plan, **OPTIONS)
    running = iter(first)
    start = rows_of([next(running) for _ in range(20)])
    state = first.state_dict()
    gone = every_tenth(plan)
    take(own_pool, gone)
    assert np.array_equal(start, whole[:320])
    assert np.array_equal(rows_of([next(running)]), whole[320:336])
    first.close()
    second = Loader(plan, **OPTIONS)
    second.load_state_dict(state)
    rest = rows_of(read(second, 40))
    lost = np.isin(whole[320:], gone)
    assert np.array_equal(rest[~lost], whole[320:][~lost])
    assert not np.isin(rest, gone).any()


def test_damage_is_still_counted(own_pool, tmp_path, take, caplog):
    """A removed sample of a tar that is gone is removed; its neighbours are damaged."""
    from tailwise.errors import UserError

    plan = make_plan(own_pool, "p", REQUESTS["stream"])
    gone = every_tenth(plan)
    first, last = plan.shard_offsets[3:5].tolist()
    loader = Loader(plan, **OPTIONS)
    batches = [loader.order.batch(number).rows for number in range(60)]
    loader.close()
    hit = next(rows for rows in batches if ((rows >= first) & (rows < last) & ~np.isin(rows, gone))[:-1].any())
    gone = sorted({*gone, int(hit[-1])})  # the batch that meets damage first ends with a removed sample
    take(own_pool, gone)
    (tmp_path / "pool" / "00003.tar").unlink()
    options = {**OPTIONS, "on_damaged": "replace", "max_replaced": 1.0}
    replaced = [item for batch in read(Loader(plan, **options), 60) for item in batch.replaced]
    for item in replaced:
        assert item.reason.startswith("removed: ") == (item.row in gone)
        assert item.row in gone or first <= item.row < last
    assert {item.reason.startswith("removed: ") for item in replaced} == {True, False}
    caplog.clear()
    read(Loader(plan, check="none", **options), 60)
    warnings = [record.getMessage() for record in caplog.records if "a sample was replaced" in record.getMessage()]
    assert len(warnings) == 1
    assert "No such file" in warnings[0]
    with pytest.raises(UserError, match="1 of 24 shards can't be read"):
        Loader(plan, **OPTIONS)
    loader = Loader(plan, check="none", **{**options, "max_replaced": 0.0})
    with pytest.raises(UserError, match=r"^[1-9] of \d+ samples had to be replaced, .*No such file") as error:
        read(loader, 60)
    key = str(error.value).split("the last one was key ")[1][:6]
    assert int(key) not in gone


@pytest.mark.parametrize("name", ["stream", "all", "rates"])
def test_they_stand_in_for_nobody(own_pool, take, make_rates_plan, name):
    if name == "rates":
        plan = make_rates_plan(own_pool, "p", np.random.default_rng(0).choice([0, 0.3, 1], 1000))
    else:
        plan = make_plan(own_pool, "p", REQUESTS[name])
    gone = every_tenth(plan, more=range(0, 1000, 2))
    take(own_pool, gone)
    substitutes = Substitutes(plan, 0, Removals.of(own_pool))
    drawn = np.flatnonzero(plan.draw(1)).tolist()[::20]
    others = {other for row in drawn for other in list(substitutes.of(row, 1))[:70]}
    assert len(others) > 20
    assert not others & set(gone)


def test_within_a_shard_each_has_a_stand_in_of_its_own(own_pool, take):
    plan = make_plan(own_pool, "p", PlanRequest("flat", keep=0.25))
    first, last = plan.shard_offsets[1:3].tolist()
    gone = list(range(first, last, 4))
    take(own_pool, gone)
    replaced = [item for batch in read(Loader(plan, **OPTIONS), 15) for item in batch.replaced]
    assert len(replaced) > 5
    assert all(first <= item.stand_in < last for item in replaced)
    assert len({item.stand_in for item in replaced}) == len(replaced)


@pytest.mark.parametrize("name", ["stream", "often"])
def test_pipelines_and_exports_leave_them_out(own_pool, tmp_path, take, name):
    plan = make_plan(own_pool, "p", REQUESTS[name])
    gone = every_tenth(plan)
    copies = plan.draw(2)
    take(own_pool, gone)
    assert np.array_equal(plan.draw(2), copies)  # the draw itself is what it was
    copies[gone] = 0
    stage = select(plan, epoch=2)
    for shard, path in enumerate(own_pool.shards()["path"].to_pylist()):
        first, last = plan.shard_offsets[shard : shard + 2].tolist()
        samples = [{"__url__": path, "__key__": f"{row:06d}"} for row in range(first, last)]
        expected = [f"{row:06d}" for row in range(first, last) for _ in range(copies[row])]
        assert [sample["__key__"] for sample in stage(samples)] == expected
    assert stage.unlisted == 0
    expected = [f"{row:06d}" for row in range(1000) for _ in range(copies[row])]
    export(plan, "keys", tmp_path / "keys.txt", epoch=2, overwrite=True)
    assert (tmp_path / "keys.txt").read_text().split() == expected
    export(plan, "parquet", tmp_path / "drawn.parquet", epoch=2)
    table = pq.read_table(tmp_path / "drawn.parquet")
    assert dict(zip(table["key"].to_pylist(), table["copies"].to_pylist(), strict=True)) == {
        f"{row:06d}": int(copies[row]) for row in np.flatnonzero(copies)
    }
    export(plan, "rates-json", tmp_path / "r.json")
    rates = json.loads((tmp_path / "r.json").read_text())
    assert len(rates) == 1000
    whole = Plan(own_pool, "p").rate(slice(0, 1000))
    whole[gone] = 0
    assert list(rates.values()) == whole.tolist()


def test_plans_made_afterwards_never_draw_them(own_pool, take):
    before = make_plan(own_pool, "before", REQUESTS["stream"])
    gone = every_tenth(before)
    take(own_pool, gone)
    for name, request in REQUESTS.items():
        plan = make_plan(
            own_pool, name, replace(request, keep=0.8 * request.keep)
        )  # of the whole pool, not of the rest
        for epoch in range(3):
            assert not plan.draw(epoch)[gone].any()
        assert [item for batch in read(Loader(plan, **OPTIONS), 30) for item in batch.replaced] == []
