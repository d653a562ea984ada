import contextlib
import itertools
import os
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from tailwise.catalog import Catalog
from tailwise.errors import UserError
from tailwise.loader.webdataset import select
from tailwise.requests import ClusterRequest, PlanRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan

wds = pytest.importorskip("webdataset")
SIZES = (40, 25, 33, 30, 12)


@pytest.fixture(scope="session")
def pool(tmp_path_factory, make_pool, make_vectors, make_embeddings):
    """A catalog of 5 shards in 2 parts, with two plans: "half", and "often" with up to 3 copies; and the shards' paths."""
    folder = tmp_path_factory.mktemp("webdataset_stage")
    tars = make_pool(folder / "shards", SIZES)
    keys = [key for keys in tars.values() for key in keys]
    make_embeddings(folder / "embeddings", make_vectors(keys, 16))
    sources = [str(folder / "shards"), str(folder / "embeddings")]
    catalog = import_pool(sources, folder / "catalog", workers=1, part_rows=90).catalog
    cluster(catalog, ClusterRequest(k=10))
    make_plan(catalog, "half", PlanRequest("dynamics", keep=0.5))
    make_plan(catalog, "often", PlanRequest("flat", keep=1.5, max_repeats=3))
    return catalog, [str(path) for path in tars]


@pytest.fixture
def open_plan(pool):
    from tailwise.plan import Plan

    return lambda name: Plan(pool[0], name)


def drawn_keys(plan, epoch):
    """The multiset of keys of an epoch, from the plan's own draw of all rows."""
    keys = [key for part in plan.catalog.parts() for key in plan.catalog.samples(part, ["key"]).column(0).to_pylist()]
    return Counter(dict(zip(keys, plan.draw(epoch).tolist(), strict=True))) + Counter()


def passed_keys(loader):
    return Counter(sample["__key__"] for sample in loader)


def as_read(url, keys, **more):
    return [{"__url__": url, "__key__": key, **more} for key in keys]


def shard_keys(shard):
    return [f"{shard:05d}{sample:04d}" for sample in range(SIZES[shard])]


KEPT = {"persistent_workers": True}


@pytest.mark.parametrize(
    ("name", "workers", "options"),
    [
        *((name, *how) for name in ("half", "often") for how in ((0, {}), (1, {}), (2, KEPT))),
        ("often", 2, {"multiprocessing_context": "forkserver", **KEPT}),  # they get the pipeline as a pickle
    ],
)
def test_an_epoch_of_a_real_pipeline_is_the_plans_draw(pool, open_plan, name, workers, options):
    plan = open_plan(name)
    stage = select(plan)
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(pool[1]), wds.split_by_worker, wds.tarfile_to_samples(), stage, wds.shuffle(50)
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers, **options)
    epochs = []
    for epoch in (0, 1, 5):
        stage.set_epoch(epoch)
        epochs.append(passed_keys(loader))
        assert epochs[-1] == drawn_keys(plan, epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stage.unlisted == 0


def test_it_composes_with_the_fluid_interface_and_decoding(pool, open_plan):
    plan = open_plan("half")
    stage = select(plan, epoch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's own, about shuffling shards
        dataset = wds.WebDataset(pool[1], shardshuffle=False).compose(stage).shuffle(20).decode("pil")
    samples = list(dataset)
    assert Counter(sample["__key__"] for sample in samples) == drawn_keys(plan, 2)
    assert all(sample["jpg"].size == (8, 8) for sample in samples)


def test_copies_are_numbered_and_shallow(pool, open_plan):
    plan = open_plan("often")
    image = b"image"
    samples = as_read(pool[1][0], shard_keys(0), jpg=image)
    passed = list(select(plan)(samples))
    copies = plan.draw(0, slice(0, SIZES[0])).tolist()
    assert max(copies) > 1
    for sample, count in zip(samples, copies, strict=True):
        own = [item for item in passed if item["__key__"] == sample["__key__"]]
        assert len(own) == count
        assert all(item["jpg"] is image for item in own)
        assert [item.get("__copy__") for item in own] == (list(range(count)) if count > 1 else [None] * count)
    assert len({id(item) for item in passed}) == len(passed)
    assert all("__copy__" not in sample for sample in samples)


def test_selection_behind_a_shuffle_of_all_shards_is_the_same(pool, open_plan):
    """Samples may come in any order: more shards at once than are kept in memory would only be slower."""
    plan = open_plan("half")
    samples = [sample for shard, url in enumerate(pool[1]) for sample in as_read(url, shard_keys(shard))]
    mixed = [samples[at] for at in np.random.default_rng(0).permutation(len(samples))]
    assert passed_keys(select(plan, 3)(mixed)) == drawn_keys(plan, 3)


def test_the_epoch_changes_while_samples_flow(pool, open_plan):
    plan = open_plan("half")
    stage = select(plan)
    samples = as_read(pool[1][0], shard_keys(0))

    def twice():
        yield from samples
        stage.set_epoch(4)
        yield from samples

    expected = [
        sample["__key__"] for epoch in (0, 4) for sample in samples if drawn_keys(plan, epoch)[sample["__key__"]]
    ]
    assert [sample["__key__"] for sample in stage(twice())] == expected


def test_only_the_shards_own_keys_are_read(pool, open_plan, watched):
    samples = as_read(pool[1][1], shard_keys(1))
    with watched(Catalog, "samples_at") as calls:
        list(select(open_plan("half"))(samples + samples))
    assert [(rows[0], rows[-1] + 1) for _, _, rows, _ in calls] == [(SIZES[0], SIZES[0] + SIZES[1])]


def test_unlisted_keys_are_dropped_and_counted_over_all_workers(tmp_path, make_pool, make_tar, make_image):
    folder = tmp_path / "shards"
    good = make_pool(folder, [10])
    members = [("a.jpg", make_image()), ("b.jpg", make_image()), ("b.txt", b"caption"), ("c.txt", b"caption")]
    tars = [*map(str, good), str(make_tar(folder / "00001.tar", members))]
    catalog = import_pool([str(folder)], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    stage = select(plan)
    pipeline = wds.DataPipeline(wds.SimpleShardList(tars), wds.split_by_worker, wds.tarfile_to_samples(), stage)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2)
    assert passed_keys(loader) == Counter([*next(iter(good.values())), "b"])
    assert stage.unlisted == 2
    passed_keys(loader)
    assert stage.unlisted == 4


@pytest.mark.parametrize("appended", [False, True], ids=["at once", "appended"])
def test_a_tar_of_which_nothing_was_good_is_dropped_and_counted(tmp_path, make_pool, make_tar, make_image, appended):
    """It is no shard of the plan, but the import knows it; others that the plan doesn't know stay an error."""
    folder = tmp_path / "shards"
    good = make_pool(folder, [10, 5])
    if appended:
        import_pool([str(folder)], tmp_path / "catalog", workers=1)
    bad = make_tar(folder / "00002.tar", [("a.jpg", make_image()), ("b.txt", b"caption")])
    catalog = import_pool([str(folder)], tmp_path / "catalog", workers=1, max_rejected=1.0).catalog
    stage = select(make_plan(catalog, "all", PlanRequest("random", keep=1.0)))
    tars = [*map(str, good), str(bad)]
    loader = wds.DataPipeline(wds.SimpleShardList(tars), wds.tarfile_to_samples(), stage)
    assert passed_keys(loader) == Counter(itertools.chain(*good.values()))
    assert stage.unlisted == 2
    for stranger in (tmp_path / "other" / "00002.tar", folder / "00003.tar"):
        with pytest.raises(UserError, match="is none of the 2 shards"):
            list(stage(as_read(str(stranger), ["a"])))


def test_a_tar_with_good_samples_is_not_taken_for_a_rejected_one(tmp_path, make_tar, make_image):
    """Its path of old, where others have its name: some of its samples were rejected, not all."""
    members = [("a.jpg", make_image()), ("b.jpg", make_image()), ("b.txt", b"caption")]
    tars = [make_tar(tmp_path / "pool" / name / "0.tar", members) for name in "xy"]
    catalog = import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1).catalog
    stage = select(make_plan(catalog, "all", PlanRequest("random", keep=1.0)))
    catalog.relocate(str(tmp_path / "pool"), str(tmp_path / "moved"))
    with pytest.raises(UserError, match="2 shards of plan 'all' have this base name"):
        list(stage(as_read(str(tars[0]), ["a", "b"])))


@pytest.mark.parametrize(
    "spell",
    [
        lambda path: f"file:{path}",
        lambda path: f"file://{path}",
        os.path.relpath,
        lambda path: path.replace("/shards/", "/shards/../shards/./"),
        lambda path: f"pipe:cat {path}",
        lambda path: f"pipe:aws s3 cp s3://bucket/pool/{path.rsplit('/', 1)[1]} -",
        lambda path: f"/elsewhere/{path.rsplit('/', 1)[1]}",
    ],
    ids=["file:", "file://", "relative", "dots", "pipe", "remote pipe", "moved"],
)
def test_other_spellings_of_a_path_are_the_same_shard(pool, open_plan, spell):
    plan = open_plan("half")
    samples = [sample for shard, url in enumerate(pool[1]) for sample in as_read(spell(url), shard_keys(shard))]
    assert passed_keys(select(plan)(samples)) == drawn_keys(plan, 0)


def test_unknown_shards_are_an_error_or_dropped(pool, open_plan):
    samples = [*as_read("/elsewhere/new.tar", ["000000000"]), *as_read(pool[1][0], shard_keys(0))]
    with pytest.raises(UserError, match=r"/elsewhere/new\.tar is none of the 5 shards .*relocate.*import") as caught:
        list(select(open_plan("half"))(samples))
    assert "\n" not in str(caught.value)
    stage = select(open_plan("half"), unknown="drop")
    assert passed_keys(stage(samples)) == passed_keys(select(open_plan("half"))(samples[1:]))
    assert stage.unlisted == 1


def test_no_two_workers_write_the_same_counter(open_plan, tmp_path, make_pool):
    tars = [str(path) for path in make_pool(tmp_path / "other", [3, 4], first_shard=9)]
    stage = select(open_plan("half"), unknown="drop")
    pipeline = wds.DataPipeline(wds.SimpleShardList(tars), wds.split_by_worker, wds.tarfile_to_samples(), stage)
    assert not list(torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2))
    assert stage.unlisted == 7
    assert sorted(stage._shared[stage._shared > 0].tolist()) == [3, 4]


def test_an_error_in_a_worker_says_the_same(pool, open_plan, tmp_path, make_pool):
    tars = [str(path) for path in make_pool(tmp_path / "other", [3], first_shard=9)]
    pipeline = wds.DataPipeline(wds.SimpleShardList(tars), wds.tarfile_to_samples(), select(open_plan("half")))
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=1)
    with pytest.raises(UserError, match=r"00009\.tar is none of the 5 shards"):
        list(loader)


def test_base_names_that_several_shards_have_are_not_guessed(tmp_path, make_pool):
    tars = {**make_pool(tmp_path / "a", [3]), **make_pool(tmp_path / "b", [3])}
    catalog = import_pool([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    for path, keys in tars.items():
        assert passed_keys(select(plan)(as_read(str(path), keys))) == Counter(keys)
    with pytest.raises(UserError, match="2 shards of plan 'all' have this base name"):
        list(select(plan)(as_read("/moved/00000.tar", ["000000000"])))


def test_another_shard_of_the_same_name_is_doubted(pool, open_plan, caplog):
    samples = as_read("/other/pool/00000.tar", [f"other {number}" for number in range(200)])
    stage = select(open_plan("half"))
    assert not list(stage(samples))
    (doubt,) = caplog.messages
    assert "the first 100 samples are all unknown to the shard of the same name" in doubt
    assert stage.unlisted == 200
    moved = as_read("/other/pool/00000.tar", shard_keys(0)) + samples
    assert passed_keys(select(open_plan("half"))(moved))
    assert caplog.messages == [doubt]


def test_it_is_picklable_and_small(pool, open_plan):
    stage = select(open_plan("half"), epoch=3)
    samples = as_read(pool[1][0], shard_keys(0))
    before = passed_keys(stage(samples))  # opened: maps, locks and caches are there, and stay behind
    content = pickle.dumps(stage)
    assert len(content) < 20_000
    again = pickle.loads(content)
    assert again.epoch == 3
    assert passed_keys(again(samples)) == before
    again.set_epoch(4)
    assert stage.epoch == 3


def test_mistakes_are_user_errors(open_plan):
    plan = open_plan("half")
    with pytest.raises(UserError, match="unknown='skip': must be one of error, drop"):
        select(plan, unknown="skip")
    with pytest.raises(UserError, match="epoch -1: must lie between"):
        select(plan, epoch=-1)
    stage = select(plan)
    with contextlib.suppress(UserError):
        stage.set_epoch(10**9)
    assert stage.epoch == 0
    with pytest.raises(UserError, match="right behind tarfile_to_samples"):
        list(stage([{"jpg": b""}]))
    with pytest.raises(UserError, match="right behind tarfile_to_samples"):
        list(stage([("image", "caption")]))


def test_a_missing_part_is_named(tmp_path, make_pool):
    tars = make_pool(tmp_path / "shards", [3])
    catalog = import_pool([str(tmp_path / "shards")], tmp_path / "catalog", workers=1).catalog
    plan = make_plan(catalog, "all", PlanRequest("random", keep=1.0))
    catalog.samples_path(0).unlink()
    with pytest.raises(UserError, match=r"part-000000\.parquet is missing or unreadable"):
        list(select(plan)(as_read(str(next(iter(tars))), ["000000000"])))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replaced_tar_of_the_same_length_is_refused(tmp_path, make_pool, workers):
    tars = [str(path) for path in make_pool(tmp_path / "shards", [6, 6])]
    catalog = import_pool([str(tmp_path / "shards")], tmp_path / "catalog", workers=1).catalog
    stage = select(make_plan(catalog, "half", PlanRequest("random", keep=0.5)))
    pipeline = wds.DataPipeline(wds.SimpleShardList(tars), wds.split_by_worker, wds.tarfile_to_samples(), stage)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    assert len(list(loader)) == 6
    content = (tmp_path / "shards" / "00001.tar").read_bytes()
    (tmp_path / "shards" / "00001.tar").write_bytes(content.replace(b"caption of 000010003", b"caption of 000010004"))
    stage._lookup = None  # what this process compared before, it doesn't compare again
    with pytest.raises(UserError, match=r"00001\.tar has other content than when it was imported"):
        list(loader)
