import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.loader.loader import Loader
from tailwise.loader.sections import units_of
from tailwise.plan import Plan
from tailwise.requests import PlanRequest
from tailwise.shards.decode import decode_rgb
from tailwise.shards.locations import ensure_locations
from tailwise.steps.planning.plan import make_plan
from tailwise.storage.local import locked

OPTIONS = {"lanes": 8, "block": 40, "seed": 3}


def augment(image):
    """Shifts a decoded image by random numbers of all three generators that augmentations use."""
    pixels = torch.from_numpy(np.array(image)).float()
    return pixels + torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002


def hashed(captions):
    """As a tokenizer: captions → int64 [n, 2]."""
    return torch.tensor([[len(caption), int(caption.split()[-1])] for caption in captions])


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


def assert_same(mine, others):
    """All that batches hold is the same, to the bit."""
    assert len(mine) == len(others)
    for one, other in zip(mine, others, strict=True):
        for name in ("rows", "epochs", "positions", "images", "texts"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture
def make_loader(open_plan):
    """`make_loader(name, batch_size=16, **options)` → a Loader with random augmentation, closed after the test."""
    made = []

    def make(name, batch_size=16, **options):
        plan = open_plan(name) if isinstance(name, str) else name
        options = {"transform": augment, "tokenizer": hashed, **OPTIONS, **options}
        made.append(Loader(plan, batch_size=batch_size, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


# --- what it gives -----------------------------------------------------------------------------------------------------


def test_images_and_captions_are_those_of_the_rows(make_loader, make_image, open_plan):
    plain = make_loader("often", transform=None, tokenizer=None)
    for number, batch in enumerate(take(plain, 40)):
        assert batch.images == [make_image(row) for row in batch.rows.tolist()]
        assert batch.texts == [f"caption {row}" for row in batch.rows.tolist()]
        assert batch.positions.tolist() == list(range(16 * number, 16 * number + 16))
        assert batch.replaced == []
        assert (batch.rows.dtype, batch.epochs.dtype, batch.positions.dtype) == (torch.int64, torch.int32, torch.int64)
    decoded = take(make_loader("often"), 3)
    for batch in decoded:
        assert batch.images.shape == (16, 8, 8, 3)
        assert batch.texts[:, 1].tolist() == batch.rows.tolist()


def test_it_reads_the_order(make_loader):
    loader = make_loader("stream")
    batches = take(loader, 70)
    for number, batch in enumerate(batches):
        expected = loader.order.batch(number)
        assert batch.rows.tolist() == expected.rows.tolist()
        assert batch.epochs.tolist() == expected.epochs.tolist()


def test_every_epoch_is_read_once_in_all(make_loader, drawn, open_plan):
    loader = make_loader("dbp", batch_size=8, transform=None, tokenizer=None)
    found = Counter()
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            found.update(zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True))
        assert loader.position == loader.batches_until(epoch + 1)
    for batch in take(loader, 100):
        found.update(zip(batch.epochs.tolist(), batch.rows.tolist(), strict=True))
    for epoch in range(3):
        copies = {row: count for (of, row), count in found.items() if of == epoch}
        assert copies == drawn(open_plan("dbp"), epoch)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(make_loader, workers):
    assert_same(take(make_loader("often", workers=workers), 40), take(make_loader("often"), 40))


def test_augmentation_differs_by_position_epoch_and_seed(make_loader):
    first, again = take(make_loader("static"), 26), take(make_loader("static", seed=4), 26)
    shifts = Counter()
    plain = {
        int(row): image
        for batch in take(make_loader("static", transform=lambda image: torch.from_numpy(np.array(image)).float()), 60)
        for row, image in zip(batch.rows, batch.images, strict=True)
    }
    for batch in first + again:
        for row, image in zip(batch.rows.tolist(), batch.images, strict=True):
            shift = image - plain[row]
            assert torch.allclose(shift, shift[0, 0, 0], atol=1e-4)
            shifts[round(float(shift[0, 0, 0]), 4)] += 1
    assert len(shifts) > 0.95 * shifts.total()


def test_the_generators_of_the_process_are_left_alone(make_loader):
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    for loader in (make_loader("stream"), make_loader("stream", transform=None), make_loader("stream", workers=1)):
        take(loader, 3)
        loader.seek(40)
        take(loader, 3)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert all(np.array_equal(*pair) for pair in zip(np.random.get_state(), before[2], strict=True))  # noqa: NPY002


# --- position ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "ranks", "workers"), [(1, 1, 0), (7, 2, 2), (33, 4, 1), (62, 1, 2), (63, 2, 0)])
def test_it_goes_on_at_any_batch_with_other_ranks_and_workers(make_loader, stop, ranks, workers):
    whole = take(make_loader("stream"), stop + 5)
    first = make_loader("stream", batch_size=8, world_size=2, rank=1, workers=1)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"] == stop
    options = {"batch_size": 16 // ranks, "world_size": ranks, "workers": workers}
    parts = []
    for rank in range(ranks):
        loader = make_loader("stream", rank=rank, **options)
        loader.load_state_dict(state)
        parts.append(take(loader, 5))
    for number in range(5):
        for name in ("rows", "epochs", "positions", "images", "texts"):
            gathered = torch.cat([getattr(part[number], name) for part in parts])
            assert torch.equal(gathered, getattr(whole[stop + number], name))


def test_position_counts_what_was_consumed_not_what_was_read_ahead(make_loader):
    loader = make_loader("stream", workers=2, prefetch=8)
    batches = iter(loader)
    for consumed in range(6):
        assert loader.position == loader.state_dict()["position"] == consumed
        next(batches)
    time.sleep(0.3)  # workers read ahead meanwhile
    assert loader.position == 6


def test_seek_goes_anywhere(make_loader):
    whole = take(make_loader("stream"), 60)
    loader = make_loader("stream", workers=1)
    for batch in (50, 3, 3, 0, 59):
        loader.seek(batch)
        assert loader.position == batch
        assert_same(take(loader, 1), [whole[batch]])
    with pytest.raises(UserError, match="batch -1: must be at least 0"):
        loader.seek(-1)


def test_seeking_the_next_batch_keeps_the_workers(make_loader):
    loader = make_loader("stream", workers=1, transform=lambda image: torch.tensor(os.getpid()))
    before = take(loader, 1)[0].images[0]
    loader.seek(1)
    assert take(loader, 1)[0].images[0] == before
    loader.seek(9)
    assert take(loader, 1)[0].images[0] != before


def test_epochs_follow_each_other_without_a_gap(make_loader):
    whole = take(make_loader("stream"), 93)
    loader = make_loader("stream")
    read = [batch for epoch in range(3) for batch in loader.epoch(epoch)]
    assert_same(read, whole)
    assert loader.epoch_at(loader.position) == 2  # which the batch begins in that completes it
    assert_same(list(loader.epoch(1)), whole[31:62])
    loader.load_state_dict({**loader.state_dict(), "position": 40})
    assert_same(list(loader.epoch(1)), whole[40:62])


def test_an_order_that_begins_later_is_the_same_by_epochs(make_loader, drawn, open_plan):
    loader = make_loader("all", batch_size=8, first_epoch=5, transform=None)
    batches = list(loader.epoch(5))
    assert sum(len(batch.rows) for batch in batches) == 1000
    with pytest.raises(UserError, match="epoch 4: the order begins with epoch 5"):
        next(loader.epoch(4))
    assert Counter(row for batch in batches for row in batch.rows.tolist()) == drawn(open_plan("all"), 5)


# --- the documented loop, resumed --------------------------------------------------------------------------------------


def loop(loader, epochs, stop=None):
    """`for epoch in range(epochs): for batch in loader.epoch(epoch)`, left when `stop` batches have come → their first positions."""
    seen = []
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            seen.append(int(batch.positions[0]) // 16)
            if len(seen) == stop:
                return seen
    return seen


@pytest.mark.parametrize(
    "stop", [1, 30, 31, 32, 61, 62, 63, 92, 93]
)  # 31 batches an epoch and a bit; 31, 62 end one, 93 ends all
def test_the_same_loop_goes_on_where_it_stopped(make_loader, stop):
    first = make_loader("stream", transform=None, tokenizer=None)
    assert loop(first, 3, stop) == list(range(stop))
    again = make_loader("stream", transform=None, tokenizer=None)
    again.load_state_dict(first.state_dict())
    assert loop(again, 3) == list(range(stop, 93))
    assert loop(again, 3) == list(range(93))  # whoever begins the loop once more gets all of it


def test_a_finished_epoch_that_is_asked_for_twice_is_read(make_loader):
    loader = make_loader("static", transform=None, tokenizer=None)
    size = loader.batches_until(1)
    loop(loader, 1)
    again = make_loader("static", transform=None, tokenizer=None)
    again.load_state_dict(loader.state_dict())
    assert [len(list(again.epoch(0))) for _ in range(3)] == [0, size, size]
    again.load_state_dict(loader.state_dict())
    again.seek(0)
    assert len(list(again.epoch(0))) == size


def test_what_is_no_state_is_refused(make_loader):
    with pytest.raises(UserError, match=r"this isn't a state of a loader: order, options, .* missing"):
        make_loader("stream").load_state_dict({"position": 3})


# --- lanes and warnings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 10, 48, 96, 100])
def test_lanes_fit_any_batch(make_loader, drawn, open_plan, batch_size):
    loader = make_loader("all", batch_size=batch_size, lanes=None, transform=None, tokenizer=None)
    rows = Counter(row for batch in take(loader, 1000 // batch_size) for row in batch.rows.tolist())
    assert rows.total() == 1000 // batch_size * batch_size
    assert rows <= drawn(open_plan("all"), 0)


def test_lanes_by_default_are_those_of_before(open_plan):
    assert Loader(open_plan("stream"), batch_size=128).order.options.lanes == 64
    assert Loader(open_plan("stream"), batch_size=100, rank=3, world_size=8).order.options.lanes == 32


def test_other_ranks_take_the_lanes_of_the_state(make_loader):
    alone = make_loader("stream", batch_size=96, lanes=None, transform=None)
    whole = take(alone, 5)
    three = [
        make_loader("stream", batch_size=32, rank=rank, world_size=3, lanes=None, transform=None) for rank in range(3)
    ]
    assert {alone.order.options.lanes, three[0].order.options.lanes} == {32, 48}
    with pytest.raises(UserError, match="lanes 32 → 48"):  # which three ranks can't share
        three[0].load_state_dict(alone.state_dict())
    rows = [[batch.rows for batch in take(loader, 6)] for loader in three]
    alone.load_state_dict({**three[0].state_dict(), "position": 2})
    for number in range(2, 6):
        assert torch.equal(take(alone, 1)[0].rows, torch.cat([part[number] for part in rows]))
    assert len(whole) == 5


def test_an_epoch_that_fills_no_batch_is_told(make_loader, caplog):
    loader = make_loader("stream", batch_size=600, lanes=None, transform=None, tokenizer=None)
    assert [len(list(loader.epoch(epoch))) for epoch in range(3)] == [0, 1, 1]
    assert "epoch 0 of plan 'stream' fills no batch: it draws 500 samples, a global batch takes 600" in caplog.text


def test_a_batch_that_holds_a_sample_twice_is_told_once(make_loader, caplog):
    take(make_loader("all", batch_size=500, lanes=None, transform=None, tokenizer=None), 8)
    assert caplog.text == ""
    batches = take(make_loader("all", batch_size=990, lanes=None, transform=None, tokenizer=None), 8)
    repeats = [len(batch.rows) - len(set(batch.rows.tolist())) for batch in batches]
    first = next(number for number, count in enumerate(repeats) if count)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"batch {first} holds {repeats[first]} samples that it holds already")
    assert "draws 1,000 samples, which is too few to keep equal ones 990 apart" in record.getMessage()


@pytest.mark.parametrize(("ranks", "accumulation", "compose"), [(2, 1, "shuffle"), (1, 2, "shuffle"), (2, 2, "spread")])
def test_a_step_that_holds_a_sample_twice_is_told_on_every_rank(make_loader, caplog, ranks, accumulation, compose):
    def steps(size):
        shared = {"lanes": None, "transform": None, "tokenizer": None, "accumulation": accumulation, "compose": compose}
        loaders = [
            make_loader("all", batch_size=size // ranks // accumulation, rank=rank, world_size=ranks, **shared)
            for rank in range(ranks)
        ]
        return [take(loader, 8 * accumulation) for loader in loaders]

    steps(400)
    assert caplog.text == ""
    parts = steps(980)
    counts = []
    for number in range(8 * accumulation):
        of_step = [batch for part in parts for batch in part[number - number % accumulation : number + 1]]
        rows = torch.cat([batch.rows for batch in of_step])
        counts.append(len(rows) - len(rows.unique()))
    first = next(number for number, count in enumerate(counts) if count)
    assert len(caplog.records) == ranks
    for record in caplog.records:
        holder = "it" if accumulation == 1 else "its step"
        assert record.getMessage().startswith(
            f"batch {first} holds {counts[first]} samples that {holder} holds already"
        )


def test_a_repeat_beside_a_replaced_sample_is_told(make_loader, caplog):
    def decode(content):
        if zlib.crc32(content) % 20 == 0:
            raise ValueError("one that can't be decoded")
        return decode_rgb(content)

    batches = take(make_loader("all", batch_size=990, lanes=None, decode=decode, max_replaced=1.0), 2)
    assert all(batch.replaced for batch in batches)
    assert "samples that it holds already" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"another order \(seed 3 → 4\)"),
        ({"batch_size": 8}, "batch_size 16 → 8"),
        ({"lanes": 4, "block": 9}, r"lanes 8 → 4, block 40 → 9"),
        ({"compose": "spread"}, "compose 'shuffle' → 'spread'"),
        ({"first_epoch": 1}, "first_epoch 0 → 1"),
        ({"accumulation": 2}, "accumulation 1 → 2"),
    ],
)
def test_the_state_of_another_order_is_refused(make_loader, change, message):
    state = make_loader("stream").state_dict()
    loader = make_loader("stream", **change)
    with pytest.raises(UserError, match=message):
        loader.load_state_dict({**state, "position": 5})
    assert loader.position == 0


def test_the_state_of_another_plan_is_refused(make_loader, small_catalog):
    state = make_loader("stream").state_dict()
    with pytest.raises(UserError, match="plan 'stream' → 'all'"):
        make_loader("all").load_state_dict(state)
    namesake = make_plan(small_catalog, "stream", PlanRequest("random", keep=0.5))
    with pytest.raises(UserError, match="the plan was rebuilt"):
        make_loader(namesake).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2: must lie between 0 and 1"),
        ({"rank": -1}, "rank -1: must lie between 0 and 0"),
        (
            {"rank": 0, "world_size": 3},
            "8 lanes: must divide the global batch of 48 samples, and be a multiple of the 3 ranks",
        ),
        ({"world_size": 3}, "world_size 3 without rank: give both"),
        ({"world_size": 0}, "world_size 0: must be at least 1"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"batch_size": -4}, "batch_size -4: must be at least 1"),
        ({"on_damaged": "skip"}, "on_damaged 'skip': must be one of error, replace"),
        ({"max_replaced": 1.5}, "max_replaced 1.5: must lie between 0 and 1"),
        ({"workers": -1}, "workers -1: must be at least 0"),
        ({"prefetch": 0}, "prefetch 0: must be at least 1"),
        ({"batch_size": 12}, "8 lanes: must divide the global batch of 12 samples; leave lanes out, or give 12"),
        ({"check": "hash"}, "unknown check 'hash'"),
    ],
)
def test_options_out_of_bounds_are_refused(make_loader, options, message):
    with pytest.raises(UserError, match=message):
        make_loader("stream", **options)


# --- processes ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from tailwise.catalog import Catalog
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

folder, name, rank, ranks, workers, rendezvous = sys.argv[1:]
rank, ranks = int(rank), int(ranks)

def main():
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    options = dict(lanes=8, block=40, seed=3, workers=int(workers))
    loader = Loader(Plan(Catalog.open(folder), name), batch_size=16 // ranks, rank=rank, world_size=ranks, **options)
    sequence = []
    for epoch in range(2):
        batches = torch.tensor([loader.batches_until(epoch + 1) - loader.position])
        counts = [torch.zeros_like(batches) for _ in range(ranks)]
        dist.all_gather(counts, batches)
        assert len({int(count) for count in counts}) == 1
        for batch in loader.epoch(epoch):
            mine = torch.stack([batch.positions, batch.rows, batch.epochs.long()])
            parts = [torch.zeros_like(mine) for _ in range(ranks)]
            dist.all_gather(parts, mine)
            sequence.append(torch.cat(parts, dim=1).tolist())
    loader.close()
    if rank == 0:
        print(json.dumps(sequence))
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run_ranks(fork_python, tmp_path):
    """`run_ranks(folder, name, ranks, workers)` → the batches that so many processes read together."""

    def run(folder, name, ranks, workers):
        place, outputs = tmp_path / f"rendezvous-{ranks}", [tmp_path / f"{rank}-of-{ranks}" for rank in range(ranks)]
        processes = [
            fork_python(SCRIPT, folder, name, rank, ranks, workers, place, out=out, err=f"{out}.log")
            for rank, out in enumerate(outputs)
        ]
        assert ended(processes) == [0] * ranks
        return json.loads(outputs[0].read_text())

    return run


def ended(processes):
    """The exit codes of processes, once they have ended."""
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


@pytest.fixture
def fresh_plan(own_pool):
    """A plan that nothing was ever read from, of a catalog of the test's own."""
    return make_plan(own_pool, "fresh", PlanRequest("flat", keep=0.5))


def test_processes_that_start_together_share_one_sequence(fresh_plan, run_ranks, make_loader):
    """Nothing is prepared yet: all of them find that units have to be counted."""
    folder = fresh_plan.catalog.folder
    four = run_ranks(folder, "fresh", 4, workers=0)
    assert run_ranks(folder, "fresh", 2, workers=1) == four
    loader = make_loader(fresh_plan)
    alone = [
        [batch.positions.tolist(), batch.rows.tolist(), batch.epochs.tolist()]
        for epoch in range(2)
        for batch in loader.epoch(epoch)
    ]
    assert alone == four
    assert len(alone) == 62


def test_workers_may_be_spawned(make_loader):
    """They get the dataset pickled, after it has mapped and opened what it needs."""
    loader = make_loader("often", transform=None, tokenizer=list)
    expected = take(loader, 30)
    assert len(pickle.dumps(loader.plan)) < 1000
    spawned = make_loader("often", transform=None, tokenizer=list, workers=1)
    spawned._dataset = loader._dataset
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        found = take(spawned, 30)
    finally:
        torch.multiprocessing.set_start_method(method, force=True)
    assert [batch.images for batch in found] == [batch.images for batch in expected]
    assert [batch.rows.tolist() for batch in found] == [batch.rows.tolist() for batch in expected]


def own_kilobytes(process):
    """Memory that no file backs. Pages that a worker shares with its parent count too: else each that it touches looks like growth."""
    with open(f"/proc/{process}/status") as stream:  # noqa: PTH123
        return next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))


MEMORY = """
import sys
from tailwise.catalog import Catalog
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

if __name__ == "__main__":
    loader = Loader(Plan(Catalog.open(sys.argv[1]), sys.argv[2]), batch_size=16, lanes=8, workers=2, tokenizer=list)
    for epoch in range(22):
        for batch in loader.epoch(epoch):
            pass
        print(epoch, flush=True)
        sys.stdin.readline()
"""


def test_twenty_epochs_take_no_more_memory_than_two(fresh_plan, tmp_path, descendants):
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    command = [sys.executable, script, str(fresh_plan.catalog.folder), "fresh"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    used, workers = [], []
    try:
        for _ in range(22):
            assert process.stdout.readline()
            workers.append(descendants(process.pid))
            used.append([own_kilobytes(each) for each in (process.pid, *workers[-1])])
            process.stdin.write("\n")
            process.stdin.flush()
    finally:
        process.kill()
        process.communicate()
    assert all(len(each) == 2 for each in workers)
    assert workers[0] == workers[-1]  # the same processes from first to last
    early, late = np.array(used[1:4]).max(axis=0), np.array(used[-3:]).min(axis=0)
    assert (late < early + 1024).all(), (early, late)  # a few pages more are not a leak


# --- catalogs that can't be written to, or were left in the middle -----------------------------------------------------


def test_units_are_counted_once_and_kept(fresh_plan, tree_bytes):
    folder = fresh_plan.folder / "units"
    counted = units_of(fresh_plan, 3)
    copies = fresh_plan.draw(3)
    offsets = fresh_plan.shard_offsets
    for shard, copy, rows in counted.tolist():
        assert rows == (copies[offsets[shard] : offsets[shard + 1]] > copy).sum()
    assert counted[:, 2].sum() == copies.sum()
    assert np.array_equal(np.lexsort((counted[:, 1], counted[:, 0])), np.arange(len(counted)))
    before = tree_bytes(folder)
    assert sorted(before) == ["epoch-000000003.json", "epoch-000000003.npy"]
    again = units_of(Plan(fresh_plan.catalog, "fresh"), 3)
    assert np.array_equal(again, counted)
    assert tree_bytes(folder) == before


def test_a_static_plan_is_counted_once_for_all_epochs(own_pool):
    plan = make_plan(own_pool, "s", PlanRequest("dbp", keep=0.5))
    assert np.array_equal(units_of(plan, 0), units_of(plan, 9))
    assert len(list((plan.folder / "units").glob("*.npy"))) == 1


def test_units_of_many_copies_and_large_shards(own_pool, make_rates_plan, monkeypatch):
    from tailwise.loader import sections

    monkeypatch.setattr(sections, "CHUNK_ROWS", 50)  # chunks of a few shards, some of one that is larger
    rates = np.random.default_rng(0).choice([0, 1, 255], 1000)
    plan = make_rates_plan(own_pool, "much", rates)
    table = units_of(plan, 0)
    assert table[:, 2].sum() == rates.sum()
    assert table[:, 1].max() == 254
    for shard in range(24):
        own = rates[plan.shard_offsets[shard] : plan.shard_offsets[shard + 1]]
        expected = [(own > copy).sum() for copy in range(own.max())]
        assert table[table[:, 0] == shard, 2].tolist() == expected


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"garbage" * 50])
def test_damaged_units_are_counted_anew(fresh_plan, content):
    counted = np.array(units_of(fresh_plan, 0))
    path = fresh_plan.folder / "units" / "epoch-000000000.npy"
    path.write_bytes(content)
    assert np.array_equal(units_of(fresh_plan, 0), counted)
    assert np.array_equal(np.load(path), counted)


READ_ONLY = """
import os, sys
os.chdir(os.path.dirname(sys.argv[2]))
from tailwise.catalog import Catalog
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

def read(folder):
    loader = Loader(Plan(Catalog.open(folder), "fresh"), batch_size=16, lanes=8, workers=1)
    rows = [batch.rows.tolist() for epoch in range(2) for batch in loader.epoch(epoch)]
    loader.close()
    return rows

if __name__ == "__main__":
    expected = read(sys.argv[2])
    if os.getuid() == 0:  # who may write whatever the modes say
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        open(os.path.join(sys.argv[1], "new"), "w")
    except PermissionError:
        print(read(sys.argv[1]) == expected)
"""


@contextmanager
def read_only(folder):
    """Nobody may write to what is in the folder, and everybody may read it, while this lasts."""
    mine = [path for path in folder.parents if path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o005]
    modes = {path: path.stat().st_mode for path in (*mine, folder, *folder.rglob("*"))}
    for path in modes:
        path.chmod(0o755 if path in mine else 0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_catalog_that_can_only_be_read(fork_python, fresh_plan, tmp_path, tree_bytes):
    """Where samples lie has been noted once; what an epoch holds was never counted."""
    folder = fresh_plan.catalog.folder
    ensure_locations(fresh_plan.catalog, fresh_plan.snapshot)
    shutil.copytree(folder, tmp_path / "writable")
    before = tree_bytes(folder)
    out = tmp_path / "out"
    with read_only(tmp_path):
        (tmp_path / "writable").chmod(0o755)
        for path in (tmp_path / "writable").rglob("*"):
            path.chmod(0o755)
        tmp_path.chmod(0o755)
        ended([fork_python(READ_ONLY, folder, tmp_path / "writable", out=out, err=tmp_path / "err")])
    assert out.read_text() == "True\n"
    assert tree_bytes(folder) == before


# --- the next epoch's counting ------------------------------------------------------------------------------------------


@pytest.fixture
def large_plan(fresh_plan, monkeypatch):
    """A plan whose epochs are counted in a process of its own, as if it were large."""
    monkeypatch.setattr("tailwise.loader.loader.MANY_ROWS", fresh_plan.rows)
    return fresh_plan


def exists(process):
    """Whether there is such a process, be it one that has ended and nobody has asked about."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_next_epoch_is_counted_while_this_one_is_read(large_plan, make_loader, tmp_path, wait_until):
    copy = tmp_path / "copy"
    shutil.copytree(large_plan.catalog.folder, copy)
    units = large_plan.folder / "units"
    loader = make_loader(large_plan)
    found = []
    for epoch in (1, 2):
        while loader._counting is None:
            found += take(loader, 1)
        process = loader._counting._process.pid
        wait_until((units / f"epoch-{epoch:09d}.npy").exists)
        wait_until(lambda: loader._counting.finished)
        assert not exists(process)
        found += take(loader, 1)
        assert loader._counting is None
    found += take(loader, 50)
    other = make_loader(Plan(Catalog.open(copy), "fresh"))
    other._prepared = 10**9  # counts itself, when it needs to
    assert_same(found, take(other, len(found)))
    assert other._counting is None
    for epoch in range(3):
        name = f"epoch-{epoch:09d}.npy"
        assert (units / name).read_bytes() == (copy / "plans" / "fresh" / "units" / name).read_bytes()


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_counting_ends_with_the_loader(large_plan, how):
    loader = Loader(large_plan, batch_size=16, **OPTIONS)
    loader.order.batch(0)
    next_epoch = large_plan.folder / "units" / "epoch-000000001.npy"
    next_epoch.unlink(missing_ok=True)
    with locked(
        large_plan.folder / ".units.lock", "units", wait=True
    ):  # so that the counting takes as long as this does
        take(loader, 1)
        process = loader._counting._process.pid
        assert exists(process)
        if how == "closed":
            loader.close()
        else:
            del loader
        assert not exists(process)
    assert not next_epoch.exists()


EXIT = """
import sys
from tailwise.catalog import Catalog
from tailwise.loader import loader
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

loader.MANY_ROWS = 1
reads = Loader(Plan(Catalog.open(sys.argv[1]), "fresh"), batch_size=16, lanes=8)
reads.order.batch(0)
(reads.plan.folder / "units" / "epoch-000000001.npy").unlink()
next(iter(reads))
print(reads._counting._process.pid)
"""


def test_counting_ends_with_the_process(fresh_plan):
    for epoch in range(5):
        units_of(fresh_plan, epoch)
    command = [sys.executable, "-c", EXIT, str(fresh_plan.catalog.folder)]
    with locked(fresh_plan.folder / ".units.lock", "units", wait=True):
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
        assert not exists(int(result.stdout))


# --- a parent that is killed --------------------------------------------------------------------------------------------

KILLED = """
import sys, time
import numpy as np
import torch
from tailwise.catalog import Catalog
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

def to_pixels(image):
    return torch.from_numpy(np.array(image))

def wordy(captions):
    return ["x" * 100_000 for _ in captions]  # more than a pipe takes

if __name__ == "__main__":
    plan = Plan(Catalog.open(sys.argv[1]), "fresh")
    loader = Loader(plan, batch_size=16, lanes=8, workers=2, transform=to_pixels, tokenizer=wordy)
    next(iter(loader))
    print("reading", flush=True)
    time.sleep(1000)
"""


def test_workers_end_with_a_parent_that_is_killed(fork_python, fresh_plan, tmp_path, wait_until, descendants, running):
    """Even while they hang in a full pipe to it."""
    out = tmp_path / "out"
    process = fork_python(KILLED, fresh_plan.catalog.folder, out=out, err=tmp_path / "err")
    try:
        wait_until(lambda: out.read_text() == "reading\n", process.is_alive)
        workers = descendants(process.pid)
        assert len(workers) == 2
        time.sleep(0.5)  # they fill the pipe meanwhile
    finally:
        process.kill()
        process.join()
    wait_until(lambda: not any(map(running, workers)))


COUNT = """
import sys
from tailwise.catalog import Catalog
from tailwise.loader.sections import units_of
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

plan = Plan(Catalog.open(sys.argv[1]), "fresh")
units_of(plan, 0)
print("begin", flush=True)
for epoch in range(1, 1_000_000):
    units_of(plan, epoch)
"""


def test_a_kill_while_units_are_counted(fork_python, fresh_plan, tmp_path, wait_until):
    folder = fresh_plan.folder / "units"
    reached = 1
    for trial in range(2):
        out = tmp_path / f"out-{trial}"
        process = fork_python(COUNT, fresh_plan.catalog.folder, out=out, err=tmp_path / "err")
        wait_until(lambda out=out: out.read_text() == "begin\n", process.is_alive)
        wait_until(lambda: len(list(folder.glob("epoch-*.npy"))) >= reached + 5, process.is_alive)  # noqa: B023
        process.kill()
        process.join()
        reached = len(list(folder.glob("epoch-*.npy")))
    for epoch in range(
        reached + 2
    ):  # none is half written, nobody waits for a lock of the dead, and leftovers don't matter
        assert units_of(fresh_plan, epoch)[:, 2].sum() == fresh_plan.draw(epoch).sum()


def test_threads_that_count_at_once_agree(fresh_plan):
    plans = [Plan(Catalog.open(fresh_plan.catalog.folder), "fresh") for _ in range(4)]
    found = [None] * 4

    def count(at):
        found[at] = [np.array(units_of(plans[at], epoch)) for epoch in range(12)]

    threads = [threading.Thread(target=count, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for epoch in range(12):
        assert all(np.array_equal(found[at][epoch], found[0][epoch]) for at in range(1, 4))
        assert found[0][epoch][:, 2].sum() == fresh_plan.draw(epoch).sum()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_fails_once_loses_no_batch(open_plan, workers, tmp_path):
    failed = tmp_path / "failed"

    def fails_once(image):
        if not failed.exists():
            failed.touch()
            raise KeyboardInterrupt if workers == 0 else RuntimeError("once")
        return to_pixels(image)

    plan = open_plan("stream")
    expected = [batch.rows for batch in itertools.islice(Loader(plan, batch_size=16, lanes=4), 6)]
    loader = Loader(plan, batch_size=16, lanes=4, transform=fails_once, workers=workers)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        next(iter(loader))
    assert loader.position == 0
    for rows, batch in zip(expected, loader, strict=False):
        assert torch.equal(rows, batch.rows)
    loader.close()


def test_random_tokens_are_keyed_like_pixels(open_plan):
    class Masking:
        """As open_clip's tokenizers with a reduction mask."""

        reduction_fn = True

        def __call__(self, captions):
            return torch.stack([torch.randint(0, 1000, (4,)) for _ in captions])

    plan = open_plan("stream")
    runs = [Loader(plan, batch_size=16, lanes=4, tokenizer=Masking(), workers=workers) for workers in (0, 2)]
    texts = [torch.cat([batch.texts for batch in itertools.islice(loader, 5)]) for loader in runs]
    assert torch.equal(*texts)
    assert len(torch.unique(texts[0], dim=0)) > 70


def test_an_image_may_be_decoded_by_another_library(open_plan):
    plan = open_plan("stream")
    loader = Loader(plan, batch_size=16, lanes=4, decode=decode_image_bytes, transform=lambda pixels: pixels / 255)
    other = Loader(plan, batch_size=16, lanes=4, transform=to_pixels)
    assert (next(iter(loader)).images - next(iter(other)).images).abs().max() < 0.02


def to_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def decode_image_bytes(encoded):
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)


# --- ranks that nobody names -------------------------------------------------------------------------------------------

RANKS = """
import json, logging, os, sys
import torch.distributed as dist
from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.loader.loader import Loader
from tailwise.plan import Plan
from tailwise.shards.decode import decode_rgb

folder, rank, rendezvous = sys.argv[1:]
plan = Plan(Catalog.open(folder), "stream")

def rows(loader):
    batches = iter(loader)
    return [next(batches).rows.tolist() for _ in range(3)]

def attempt(work):
    try:
        return work()
    except UserError as error:
        return str(error)

def find(way, join):
    if way == "late":
        loader = Loader(plan, batch_size=8)
        join()
        return attempt(lambda: rows(loader))
    if way == "environment":
        os.environ.update(RANK=rank, WORLD_SIZE="2")
        loader = Loader(plan, batch_size=8)
        join()
        return rows(loader)
    join()
    if way == "own":
        groups = [dist.new_group([number]) for number in range(2)]
        return rows(Loader(plan, batch_size=8, group=groups[int(rank)]))
    if way == "other":
        groups = [dist.new_group([number]) for number in range(2)]
        return attempt(lambda: Loader(plan, batch_size=8, group=groups[1]) and "made")
    given = {"found": {}, "given": {"rank": int(rank), "world_size": 2}, "wrong": {"rank": 0, "world_size": 1}}[way]
    return attempt(lambda: rows(Loader(plan, batch_size=8, **given)))

for way in ("late", "found", "given", "wrong", "own", "other", "environment"):
    place = f"file://{rendezvous}-{way}"
    found = find(way, lambda: dist.init_process_group("gloo", init_method=place, rank=int(rank), world_size=2))
    print(json.dumps([way, found]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(fork_python, order_pool, open_plan, tmp_path_factory):
    """{way: what two processes of a gloo group find}; each way begins and ends a group of its own."""
    folder = tmp_path_factory.mktemp("ranks")
    outputs = [folder / f"out-{rank}" for rank in range(2)]
    processes = [
        fork_python(RANKS, order_pool.folder, rank, folder / "place", out=out, err=f"{out}.log")
        for rank, out in enumerate(outputs)
    ]
    assert ended(processes) == [0, 0], [Path(f"{out}.log").read_text() for out in outputs]
    first, second = (dict(map(json.loads, out.read_text().splitlines())) for out in outputs)
    return {way: [found, second[way]] for way, found in first.items()}


@pytest.mark.parametrize("way", ["found", "given", "environment"])
def test_ranks_share_the_batches_without_being_named(two_ranks, open_plan, way):
    whole = [batch.rows.tolist() for batch in take(Loader(open_plan("stream"), batch_size=16), 3)]
    first, second = two_ranks[way]
    assert [one + other for one, other in zip(first, second, strict=True)] == whole


def test_a_group_may_be_named(two_ranks, open_plan):
    whole = [batch.rows.tolist() for batch in take(Loader(open_plan("stream"), batch_size=8), 3)]
    assert two_ranks["own"] == [whole, whole]


def test_ranks_that_are_not_those_of_the_group_are_refused(two_ranks):
    for rank, said in enumerate(two_ranks["wrong"]):
        assert f"rank 0 and world_size 1: this process is rank {rank} of a process group of 2; leave both out" in said
    for rank, said in enumerate(two_ranks["late"]):
        assert f"made for rank 0 of 1, but the process is rank {rank} of a group of 2: make the loader after" in said
    refused, made = two_ranks["other"]
    assert "does not belong to the group" in refused
    assert made == "made"


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": "two", "RANK": "0"}]
)
def test_a_rank_that_cannot_be_found_is_refused(open_plan, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"WORLD_SIZE is \w+ and RANK is \w+: set both as torchrun does, or give rank"):
        Loader(open_plan("stream"), batch_size=8)
    assert Loader(open_plan("stream"), batch_size=8, rank=1, world_size=4).order.options.batch_size == 32


# --- workers that end, and the end of the process ----------------------------------------------------------------------


KILLED_WORKER = """
import os, signal, sys
from concurrent.futures.process import BrokenProcessPool
import torch
from tailwise.catalog import Catalog
from tailwise.loader.loader import Loader
from tailwise.plan import Plan

def process_id(image):
    return torch.tensor(os.getpid())

if __name__ == "__main__":
    loader = Loader(Plan(Catalog.open(sys.argv[1]), "stream"), batch_size=16, transform=process_id, workers=1)
    os.kill(int(next(iter(loader)).images[0]), signal.SIGKILL)
    try:
        for batch in loader:
            pass
    except BrokenProcessPool as error:
        print(error)
    position = loader.position
    print(next(iter(loader)).positions[0].item() - 16 * position)
    loader.close()
"""


def test_a_killed_worker_is_told_and_loses_no_batch(fork_python, open_plan, tmp_path):
    # in a process of its own: torch keeps failed workers in mind, and raises at the next signal of a child
    out, err = tmp_path / "out", tmp_path / "err"
    process = fork_python(KILLED_WORKER, open_plan("stream").catalog.folder, out=out, err=err)
    assert ended([process]) == [0], err.read_text()
    message, distance = out.read_text().splitlines()
    assert re.match("a worker of the loader ended .*fewer workers", message)
    assert distance == "0"


def test_what_workers_cannot_be_given_is_told(open_plan):
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(
            UserError, match=r"can't be sent to worker processes .*define it in a module, or give workers=0"
        ):
            take(Loader(open_plan("stream"), batch_size=16, transform=lambda image: image, workers=1), 1)
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"transform": augment, "tokenizer": hashed}])
def test_iterators_at_the_same_time_do_not_disturb_each_other(open_plan, workers, options):
    loader = Loader(open_plan("stream"), batch_size=16, workers=workers, **options)
    whole = [batch.rows.tolist() for batch in take(loader, 7)]
    loader.seek(0)
    for one, other, batch in zip(iter(loader), iter(loader), whole[:3], strict=False):
        assert one.rows.tolist() == other.rows.tolist() == batch
    assert loader.position == 4  # zip takes one more of both
    loader.seek(1)
    one, other = iter(loader), loader.epoch(0)
    assert [next(one).rows.tolist() for _ in range(4)] == whole[1:5]
    assert (next(other).rows.tolist(), loader.position) == (whole[1], 2)
    assert next(one).rows.tolist() == whole[5]
    third = iter(loader)  # where the last one is
    assert next(third).rows.tolist() == whole[6]
    loader.seek(2)
    assert [next(item).rows.tolist() for item in (one, other, third)] == [whole[2]] * 3
    loader.close()
    assert [next(item).rows.tolist() for item in (one, other)] == [whole[3]] * 2
    loader.close()


def test_an_iterator_that_is_dropped_leaves_its_workers_to_the_next(make_loader, descendants):
    loader = make_loader("stream", workers=2)
    for _ in loader:
        break
    started = descendants(os.getpid())
    for _ in loader.epoch(0):
        break
    assert loader.position == 2
    assert descendants(os.getpid()) == started


def test_nothing_is_printed_when_the_interpreter_ends(order_pool, open_plan):
    code = (
        "import builtins, sys\n"
        "from tailwise.catalog import Catalog\nfrom tailwise.loader.loader import Loader\nfrom tailwise.plan import Plan\n"
        "builtins.kept = Loader(Plan(Catalog.open(sys.argv[1]), 'stream'), batch_size=16)\n"  # outlives all modules
        "batch = next(iter(builtins.kept))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, order_pool.folder], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
