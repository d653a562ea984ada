import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.kernels.substitutes import match_left_out
from tailwise.loader.loader import Loader
from tailwise.loader.substitutes import Substitutes
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

OPTIONS = {"lanes": 8, "block": 40, "batch_size": 16, "on_damaged": "replace", "max_replaced": 1.0}


def to_tensor(image):
    return torch.from_numpy(np.array(image))


def members(path):
    """{name: (offset, size)} of a tar."""
    with tarfile.open(path) as tar:
        return {item.name: (item.offset_data, item.size) for item in tar}


def overwrite(path, name, content, at=0):
    """Puts other bytes in a member's place; its size and the tar's stay."""
    offset, size = members(path)[name]
    with path.open("r+b") as stream:
        stream.seek(offset + at)
        stream.write(content[: size - at])


def shard_of(plan, row):
    return int(np.searchsorted(plan.shard_offsets, row, "right")) - 1


# --- the kernel ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.sampled_from("ds."), max_size=60))
def test_drawn_rows_are_paired_with_spare_ones_of_their_own(kinds):
    """d: drawn, s: spare; as many pairs as there can be, each spare row in one."""
    drawn, spare = (np.array([kind == which for kind in kinds], bool) for which in "ds")
    match = match_left_out(drawn, spare)
    found = match[match >= 0]
    assert match.dtype == np.int64
    assert (match[~drawn] == -1).all()
    assert spare[found].all()
    assert len(set(found.tolist())) == len(found) == min(drawn.sum(), spare.sum())


@pytest.mark.parametrize(
    ("kinds", "pairs"),
    [
        ("ds", {0: 1}),
        ("sd", {1: 0}),
        ("ddss", {0: 3, 1: 2}),
        ("d.sds", {0: 2, 3: 4}),
        ("sdds", {1: 0, 2: 3}),
        ("dd.s", {1: 3}),
    ],
)
def test_the_next_spare_row_that_no_nearer_one_has(kinds, pairs):
    drawn, spare = (np.array([kind == which for kind in kinds]) for which in "ds")
    match = match_left_out(drawn, spare)
    assert {row: int(other) for row, other in enumerate(match) if other >= 0} == pairs


# --- of a plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stream", "dbp", "static", "ranked", "bernoulli", "often", "rates"])
def test_stand_ins_are_of_the_same_shard_left_out_and_distinct(open_plan, name):
    plan = open_plan(name)
    substitutes = Substitutes(plan, 0)
    drawable = plan.rates[:] > 0 if plan.by_rate else plan.groups[:] >= 0
    for epoch in (0, 3):
        copies = plan.draw(epoch)
        compared = 0
        for first, last in pairwise(plan.shard_offsets.tolist()):
            rows = np.flatnonzero(copies[first:last]) + first
            spare = set((np.flatnonzero(drawable[first:last] & (copies[first:last] == 0)) + first).tolist())
            own = [next(substitutes.of(row, epoch)) for row in rows.tolist()]
            assert all(drawable[other] for other in own)
            if len(spare) >= len(rows):
                assert set(own) <= spare
                assert len(set(own)) == len(own)
            elif len(rows):
                assert spare <= set(own)  # each is used, before rows of other shards are
            compared += min(len(spare), len(rows))
        assert compared > 20


def test_stand_ins_are_the_same_whoever_asks(open_plan):
    def ask(rows):
        plan = open_plan("dbp")
        substitutes = Substitutes(plan, 0)
        return {row: list(substitutes.of(row, 2))[:10] for row in rows}

    rows = np.flatnonzero(open_plan("dbp").draw(2)).tolist()[:60]
    assert ask(rows) == ask(rows[::-1])
    assert ask(rows[7:8])[rows[7]] == ask(rows)[rows[7]]


def test_rows_that_are_never_drawn_stand_in_for_nobody(own_pool, make_rates_plan):
    """Rate 0 in most rows; the rest is drawn in every epoch, so that only drawn rows are left to stand in."""
    rates = np.zeros(1000)
    rates[::10] = 1
    plan = make_rates_plan(own_pool, "sparse", rates)
    others = {other for row in range(0, 1000, 50) for other in list(Substitutes(plan, 0).of(row, 0))[:20]}
    assert others
    assert all(other % 10 == 0 for other in others)


def test_nor_do_those_of_clusters_without_a_quota(own_pool):
    """A budget so small that shares are below a sample: static plans give most clusters nothing at all."""
    plan = make_plan(own_pool, "p", PlanRequest("dbp", budget=4, pick="random", min_per_cluster=0))
    without = np.flatnonzero(plan.quotas == 0)
    assert len(without)
    substitutes = Substitutes(plan, 0)
    others = [other for row in np.flatnonzero(plan.draw(0)).tolist() for other in substitutes.of(row, 0)]
    assert others
    assert not np.isin(plan.groups[np.array(others)], without).any()


# --- read from damaged tars ----------------------------------------------------------------------------------------------


@pytest.fixture
def unmarked_pool(own_pool, forget_fingerprints):
    """A pool whose tars have no fingerprints: what changes in place is found sample by sample."""
    forget_fingerprints(own_pool)
    return Catalog.open(own_pool.folder)


@pytest.fixture
def damaged(unmarked_pool, tmp_path, make_image):
    """Plan "p" over tars with a truncated image, garbage in place of one, and captions that aren't UTF-8; and the bad rows."""
    plan = make_plan(unmarked_pool, "p", PlanRequest("flat", keep=0.5))
    ensure = Loader(plan, **OPTIONS)  # locations are noted while all is well
    ensure.close()
    bad = {}
    for shard in (1, 3, 6, 14):
        path = tmp_path / "pool" / f"{shard:05d}.tar"
        first = int(plan.shard_offsets[shard])
        for at, kind in enumerate(("truncated", "garbage", "caption", "empty")):
            row = first + 5 * at + 1
            image, caption = f"{row:06d}.jpg", f"{row:06d}.txt"
            if kind == "truncated":
                overwrite(path, image, b"\0" * 10_000, at=len(make_image(row)) // 2)
                overwrite(path, image, b"\xff\xd9" * 400, at=len(make_image(row)) // 2)
            elif kind == "garbage":
                overwrite(path, image, np.random.default_rng(row).bytes(10_000))
            elif kind == "empty":
                overwrite(path, image, b"\0" * 10_000)
            else:
                overwrite(path, caption, b"caf\xe9 ")
            bad[row] = "caption" if kind == "caption" else "image"
    return plan, bad


def read(loader, batches=64):
    """The first batches, in all 2 epochs of 500 samples."""
    found = iter(loader)
    read = [next(found) for _ in range(batches)]
    loader.close()
    return read


def test_batches_keep_their_size_and_stand_ins_are_told(damaged, tmp_path, caplog):
    plan, bad = damaged
    log = tmp_path / "replaced.jsonl"
    loader = Loader(plan, transform=to_tensor, log=log, **OPTIONS)
    batches = read(loader)
    replaced = [item for batch in batches for item in batch.replaced]
    assert len(replaced) == loader.replaced > 4
    assert all(len(batch.rows) == len(batch.texts) == len(batch.images) == 16 for batch in batches)
    rows = torch.cat([batch.rows for batch in batches])
    epochs = torch.cat([batch.epochs for batch in batches])
    texts = [text for batch in batches for text in batch.texts]
    expected = np.concatenate([loader.order.batch(number).rows for number in range(64)])
    assert not np.isin(rows.numpy(), list(bad)).any()
    assert {item.position for item in replaced} == set(np.flatnonzero(np.isin(expected, list(bad))).tolist())
    draws = [plan.draw(epoch) for epoch in range(int(epochs.max()) + 1)]
    substitutes = Substitutes(plan, 0)
    for item in replaced:
        assert expected[item.position] == item.row
        assert rows[item.position] == item.stand_in
        assert texts[item.position] == f"caption {item.stand_in}"  # its own caption, not that of the lost one
        assert item.reason.startswith(bad[item.row])
        epoch = int(epochs[item.position])
        assert draws[epoch][item.stand_in] == 0
        assert item.stand_in == next(other for other in substitutes.of(item.row, epoch) if other not in bad)
    near = [item for item in replaced if shard_of(plan, item.row) == shard_of(plan, item.stand_in)]
    assert len(near) > 0.7 * len(replaced)  # the others' was bad too, or their shard had no more left out
    assert len({(int(epochs[item.position]), item.stand_in) for item in near}) == len(near)
    untouched = np.ones(len(expected), bool)
    untouched[[item.position for item in replaced]] = False
    assert np.array_equal(rows.numpy()[untouched], expected[untouched])

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    uids = [
        uid.hex() for part in plan.catalog.parts() for uid in plan.catalog.samples(part, ["uid"])["uid"].to_pylist()
    ]
    assert len(lines) == len(replaced)
    for line, item in zip(lines, replaced, strict=True):
        assert line == {
            "position": item.position,
            "row": item.row,
            "key": f"{item.row:06d}",
            "uid": uids[item.row],
            "stand_in_key": f"{item.stand_in:06d}",
            "stand_in_uid": uids[item.stand_in],
            "reason": item.reason,
        }


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (4, 0), (2, 1)])
def test_they_are_the_same_whatever_the_ranks_and_workers(damaged, tmp_path, ranks, workers):
    plan, _ = damaged
    options = {**OPTIONS, "transform": to_tensor}
    whole = read(Loader(plan, **options), 40)
    options["batch_size"] = 16 // ranks
    loaders = [Loader(plan, rank=rank, world_size=ranks, workers=workers, **options) for rank in range(ranks)]
    parts = [read(loader, 40) for loader in loaders]
    for number, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[number].rows for part in parts]), batch.rows)
        assert torch.equal(torch.cat([part[number].images for part in parts]), batch.images)
        assert [item for part in parts for item in part[number].replaced] == batch.replaced


def test_images_that_are_not_decoded_are_not_judged(damaged):
    plan, bad = damaged
    batches = read(Loader(plan, **OPTIONS))
    replaced = {item.row for batch in batches for item in batch.replaced}
    assert replaced
    assert all(bad[row] == "caption" for row in replaced)


def test_an_unreadable_stand_in_is_passed_over(unmarked_pool, tmp_path, make_image):
    """All images of a shard but one are garbage."""
    plan = make_plan(unmarked_pool, "p", PlanRequest("flat", keep=0.5))
    path = tmp_path / "pool" / "00006.tar"
    first, last = plan.shard_offsets[6:8].tolist()
    good = first + 3
    for row in range(first, last):
        if row != good:
            overwrite(path, f"{row:06d}.jpg", b"\0" * 10_000)
    loader = Loader(plan, transform=to_tensor, **OPTIONS)
    batches = read(loader)
    replaced = [item for batch in batches for item in batch.replaced]
    assert len(replaced) > 50
    assert all(first <= item.row < last and item.row != good for item in replaced)
    rows = torch.cat([batch.rows for batch in batches]).numpy()
    assert set(rows[(rows >= first) & (rows < last)].tolist()) <= {good}
    draws = [plan.draw(epoch) for epoch in range(4)]
    epochs = torch.cat([batch.epochs for batch in batches]).tolist()
    elsewhere = [item for item in replaced if item.stand_in != good]
    assert all(draws[epochs[item.position]][item.stand_in] == 0 for item in elsewhere)
    assert len({item.stand_in for item in elsewhere}) > len(elsewhere) // 2


def break_missing(path):
    path.unlink()


def break_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_grown(path):
    with path.open("ab") as stream:
        stream.write(b"\0" * 10_240)


@pytest.mark.parametrize(
    ("break_tar", "reason"),
    [(break_missing, "missing"), (break_cut, "when it was imported"), (break_grown, "when it was imported")],
)
def test_missing_and_changed_tars_are_an_error_or_replaced(own_pool, tmp_path, break_tar, reason, caplog):
    plan = make_plan(own_pool, "p", PlanRequest("flat", keep=0.5))
    path = tmp_path / "pool" / "00001.tar"
    break_tar(path)
    with pytest.raises(UserError, match=rf"1 of 24 shards can't be read as they were imported.*00001\.tar: .*{reason}"):
        Loader(plan, **{**OPTIONS, "on_damaged": "error"})
    loader = Loader(plan, **OPTIONS)
    assert "samples of this shard are replaced" in caplog.text
    batches = read(loader)
    first, last = plan.shard_offsets[1:3].tolist()
    replaced = [item for batch in batches for item in batch.replaced]
    expected = np.concatenate([loader.order.batch(number).rows for number in range(64)])
    assert len(replaced) == ((expected >= first) & (expected < last)).sum() > 50
    assert all(reason in item.reason for item in replaced)
    assert all(not first <= row < last for batch in batches for row in batch.rows.tolist())
    assert all(len(batch.rows) == 16 for batch in batches)


def test_tars_that_go_while_they_are_read(unmarked_pool, tmp_path):
    """Cut short behind the check: whatever can still be read is."""
    plan = make_plan(unmarked_pool, "p", PlanRequest("flat", keep=0.5))
    loader = Loader(plan, transform=to_tensor, **OPTIONS)
    break_cut(tmp_path / "pool" / "00001.tar")
    (tmp_path / "pool" / "00003.tar").unlink()
    replaced = [item for batch in read(loader) for item in batch.replaced]
    assert {shard_of(plan, item.row) for item in replaced} == {1, 3}
    assert any("ends at byte" in item.reason for item in replaced)
    assert any("No such file" in item.reason for item in replaced)


@pytest.mark.parametrize("workers", [0, 1])
def test_tars_that_go_while_they_are_read_are_an_error_unless_replaced(own_pool, tmp_path, workers):
    plan = make_plan(own_pool, "p", PlanRequest("flat", keep=0.5))
    loader = Loader(plan, transform=to_tensor, **{**OPTIONS, "on_damaged": "error", "workers": workers})
    (tmp_path / "pool" / "00003.tar").unlink()
    with pytest.raises(UserError, match=r"^row \d+ can't be read \(.*00003\.tar.*`on_damaged` replace"):
        read(loader)


def test_more_damage_than_may_be_replaced_is_told_before_anything_is_read(own_pool, tmp_path):
    plan = make_plan(own_pool, "p", PlanRequest("flat", keep=0.5))
    (tmp_path / "pool" / "00003.tar").unlink()
    rows = int(plan.shard_offsets[4] - plan.shard_offsets[3])
    options = {**OPTIONS, "on_damaged": "replace"}
    with pytest.raises(UserError, match=rf"^{rows} of 1,000 samples lie in 1 shards .* share 0\.001 "):
        Loader(plan, **{**options, "max_replaced": 0.001})
    assert Loader(plan, **{**options, "max_replaced": rows / 1000}).replaced == 0


def test_too_many_are_an_error(damaged, tmp_path, monkeypatch):
    from tailwise.loader import dataset as module

    plan, _ = damaged
    options = {**OPTIONS, "transform": to_tensor}
    total = sum(len(batch.replaced) for batch in read(Loader(plan, **options)))
    assert 0 < total <= module.FEW
    with pytest.raises(UserError, match=r"^[1-9]\d* of [0-9]+ samples had to be replaced"):
        read(Loader(plan, **{**options, "max_replaced": 0.0}))
    monkeypatch.setattr(module, "FEW", 3)
    read(Loader(plan, **{**options, "max_replaced": 0.1}))
    log = tmp_path / "log.jsonl"
    loader = Loader(plan, log=log, **{**options, "max_replaced": 0.001})
    with pytest.raises(
        UserError, match=r"had to be replaced, more than the share 0\.001 that may be; the last one was key \d+, uid"
    ):
        read(loader)
    assert 0 < loader.replaced <= 3  # those of the batches that were given out
    assert len(log.read_text().splitlines()) == loader.replaced
    position = loader.position
    with pytest.raises(UserError, match="had to be replaced"):
        next(iter(loader))
    assert loader.position == position


def test_counts_of_replaced_samples_are_kept_by_the_state(damaged):
    plan, _ = damaged
    first = Loader(plan, transform=to_tensor, **OPTIONS)
    read(first, 40)
    state = first.state_dict()
    second = Loader(plan, transform=to_tensor, **OPTIONS)
    second.load_state_dict(state)
    assert second.replaced == first.replaced > 0
    assert second.state_dict() == state


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pool_that_is_gone_is_told_and_goes_on_where_it_was_when_it_is_back(own_pool, tmp_path, workers):
    plan = make_plan(own_pool, "p", PlanRequest("flat", keep=0.5))
    options = {**OPTIONS, "transform": to_tensor}
    whole = read(Loader(plan, **options), 4)
    loader = Loader(plan, workers=workers, **options)
    folder = tmp_path / "pool"
    folder.rename(tmp_path / "away")
    with pytest.raises(UserError, match="nothing can be read in place of row"):
        next(iter(loader))
    (tmp_path / "away").rename(folder)
    assert loader.position == 0
    for batch, expected in zip(read(loader, 4), whole, strict=True):
        assert torch.equal(batch.rows, expected.rows)


def test_plans_opened_anew_agree(damaged):
    """Nothing of it hangs on the process: not on what was read before, nor on the order in which it was asked for."""
    plan, _ = damaged
    options = {**OPTIONS, "transform": to_tensor}
    whole = read(Loader(plan, **options), 30)
    again = Loader(Plan(Catalog.open(plan.catalog.folder), "p"), **options)
    for number in (29, 3, 17):
        again.seek(number)
        assert read(again, 1)[0].replaced == whole[number].replaced


@pytest.mark.parametrize("workers", [0, 1])
def test_postscript_is_replaced_and_starts_no_program(tmp_path, make_tar, make_image, postscript, workers):
    content, started = postscript
    members = []
    for row in range(64):
        image = content if row == 20 else make_image(row)
        members += [(f"{row:02d}.jpg", image), (f"{row:02d}.txt", b"a caption")]
    make_tar(tmp_path / "pool" / "0.tar", members)
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "p", PlanRequest("random", keep=1.0))
    loader = Loader(plan, **OPTIONS, transform=to_tensor, workers=workers)
    replaced = [item for batch in loader.epoch(0) for item in batch.replaced]
    loader.close()
    assert [item.row for item in replaced] == [20]
    assert "not an image" in replaced[0].reason
    assert not started.exists()
