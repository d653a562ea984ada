"""One epoch as a dataset of samples: exact counts, in any trainer's batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_collate

from tailwise import EpochDataset, EpochStream
from tailwise.errors import UserError

PLANS = ("stream", "dbp", "static", "ranked", "bernoulli", "often", "all", "few", "rates")


def rows_of(batches):
    return [row for batch in batches for row in batch["row"].tolist()]


@pytest.fixture
def epochs(open_plan):
    return lambda name="stream", **options: EpochDataset(open_plan(name), **{"batch_size": 32} | options)


@pytest.mark.parametrize("name", PLANS)
def test_an_epoch_holds_what_the_plan_draws(epochs, open_plan, drawn, name):
    dataset = epochs(name)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        wanted = drawn(open_plan(name), epoch)
        assert len(dataset) == sum(wanted.values())
        samples = dataset.__getitems__(range(len(dataset)))
        assert Counter(sample["row"] for sample in samples) == wanted
        assert {sample["epoch"] for sample in samples} <= {epoch}


def test_a_sample_is_the_image_and_caption_of_its_row(epochs, make_image):
    dataset = epochs(names=True)
    for at in (0, 1, -1):
        sample = dataset[at]
        assert sample["image"] == make_image(sample["row"])
        assert (sample["text"], sample["key"]) == (f"caption {sample['row']}", f"{sample['row']:06d}")
        assert len(bytes.fromhex(sample["uid"])) == 16
    assert dataset[-1] == dataset[len(dataset) - 1]
    assert "key" not in epochs()[0]


def test_epochs_and_seeds_have_orders_of_their_own(epochs):
    def rows(**options):
        dataset = epochs("all", **options)
        return [dataset[at]["row"] for at in range(50)]

    assert rows() == rows()
    assert len({tuple(rows(**options)) for options in ({}, {"epoch": 1}, {"seed": 1})}) == 3
    assert rows() != sorted(rows())


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_reaches_workers_that_run(epochs, workers):
    dataset = epochs(transform=to_tensor)
    persistent = DataLoader(dataset, batch_size=16, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        batches = list(persistent)
        alone = epochs(epoch=epoch, transform=to_tensor)
        assert rows_of(batches) == [alone[at]["row"] for at in range(len(alone))]
        assert torch.equal(batches[1]["image"], default_collate([alone[at]["image"] for at in range(16, 32)]))


def to_tensor(image):
    """Return an image with noise, which the position of the sample decides."""
    return torch.from_numpy(np.array(image)).float() + torch.rand(1)


def test_no_step_of_all_ranks_holds_a_sample_twice(epochs, open_plan, drawn):
    dataset = epochs("often", batch_size=32)
    assert max(drawn(open_plan("often"), 0).values()) > 4
    ranks = [DistributedSampler(dataset, 4, rank, shuffle=False, drop_last=True) for rank in range(4)]
    for step in zip(*([dataset[at]["row"] for at in rank] for rank in ranks), strict=True):
        assert len(set(step)) == 4
    rows = [dataset[at]["row"] for at in range(len(dataset))]
    assert all(len(set(rows[at : at + 32])) == 32 for at in range(0, len(rows) - 32, 32))


def test_it_goes_on_in_the_middle_with_other_ranks(epochs):
    dataset, done = epochs(), 96
    rest = Subset(dataset, range(done, len(dataset)))
    ranks = [DistributedSampler(rest, 2, rank, shuffle=False, drop_last=True) for rank in range(2)]
    loaders = [DataLoader(rest, batch_size=8, sampler=rank, collate_fn=lambda samples: samples) for rank in ranks]
    found = Counter(sample["row"] for loader in loaders for batch in loader for sample in batch)
    assert found == Counter(dataset[at]["row"] for at in range(done, len(dataset) - len(rest) % 2))


def test_a_lost_shard_is_an_error_or_replaced(own_pool, open_plan):
    from tailwise.plan import Plan
    from tailwise.requests import PlanRequest
    from tailwise.steps.planning.plan import make_plan

    make_plan(own_pool, "all", PlanRequest("proportional", keep=1.0))
    plan = Plan(own_pool, "all")
    (own_pool.folder.parent / "pool" / "00002.tar").unlink()
    with pytest.raises(UserError, match=r"1 of 24 shards can't be read"):
        EpochDataset(plan, batch_size=8)
    dataset = EpochDataset(plan, batch_size=8, on_damaged="replace")
    rows = [sample["row"] for sample in dataset.__getitems__(range(len(dataset)))]
    assert len(rows) == 1000
    assert not set(rows) & set(range(91, 124))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": -1}, "epoch -1: must lie between 0 and"),
        ({"epoch": 10_001}, "epoch 10001: must lie between 0 and 10,000"),
        ({"batch_size": 0}, "`batch_size` 0: must be at least 1"),
        ({"on_damaged": "skip"}, "on_damaged 'skip': must be one of"),
    ],
)
def test_options_out_of_bounds_are_refused(epochs, options, message):
    with pytest.raises(UserError, match=message):
        epochs(**options)


def test_samples_beyond_the_epoch_are_refused(epochs):
    dataset = epochs()
    for place in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"sample {place} of the 500 of epoch 0"):
            dataset[place]


# --- an iterable -----------------------------------------------------------------------------------------------------------


def batches_of(plan, ranks=1, workers=0, epoch=0, step=0, **options):
    """Rows of each rank's batches."""
    found = []
    for rank in range(ranks):
        stream = EpochStream(plan, batch_size=24, rank=rank, world_size=ranks, **options)
        stream.set_epoch(epoch, step)
        loader = DataLoader(stream, batch_size=24 // ranks, num_workers=workers, collate_fn=lambda batch: batch)
        found.append([[sample["row"] for sample in batch] for batch in loader])
        assert sum(map(len, found[-1])) == len(stream)
    return found


@pytest.mark.parametrize("name", PLANS)
def test_the_stream_of_an_epoch_is_exact(open_plan, drawn, name):
    plan = open_plan(name)
    for epoch, ranks in ((0, 1), (1, 3)):
        rows = [row for rank in batches_of(plan, ranks, epoch=epoch) for batch in rank for row in batch]
        assert Counter(rows) == drawn(plan, epoch)


def test_steps_do_not_depend_on_ranks_and_workers(open_plan):
    plan = open_plan("stream")
    (expected,) = batches_of(plan)
    assert len(expected) > 5 and all(len(set(batch)) == len(batch) for batch in expected)
    for ranks, workers in ((1, 2), (2, 0), (4, 3)):
        parts = batches_of(plan, ranks, workers)
        steps = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
        assert steps == expected
    assert [[*part] for part in zip(*batches_of(plan, 2, 2, step=3), strict=True)] == [
        [batch[: len(batch) // 2], batch[len(batch) // 2 :]] for batch in expected[3:]
    ]
    assert batches_of(plan, step=len(expected)) == [[]]


def test_the_stream_follows_set_epoch_in_workers_that_run(open_plan, drawn):
    plan = open_plan("stream")
    stream = EpochStream(plan, batch_size=24, names=True)
    loader = DataLoader(stream, batch_size=24, num_workers=2, persistent_workers=True, collate_fn=lambda batch: batch)
    for epoch in (0, 2):
        stream.set_epoch(epoch)
        samples = [sample for batch in loader for sample in batch]
        assert Counter(sample["row"] for sample in samples) == drawn(plan, epoch)
        assert {(sample["epoch"], len(sample["uid"])) for sample in samples} == {(epoch, 32)}


def test_what_a_stream_refuses(open_plan):
    plan = open_plan("stream")
    with pytest.raises(UserError, match="batch_size 10: must be a multiple of the 3 ranks"):
        EpochStream(plan, batch_size=10, rank=0, world_size=3)
    with pytest.raises(UserError, match=r"step -1: epoch 1 has \d+ steps"):
        EpochStream(plan, batch_size=24).set_epoch(1, -1)
