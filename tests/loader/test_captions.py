"""Several captions a sample: which one a draw uses, whatever ranks, workers and interruptions; and what says which it was."""

import json
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailwise.errors import UserError
from tailwise.export import export
from tailwise.kernels.keyed import hash_range, stream_key
from tailwise.loader.captions import CaptionMix
from tailwise.loader.epoch import EpochDataset
from tailwise.loader.loader import Loader
from tailwise.loader.webdataset import select
from tailwise.requests import CaptionsRequest, ExportRequest, PlanRequest, caption_weights
from tailwise.shards.webdataset import read_shard
from tailwise.steps.importing.captions import join_captions
from tailwise.steps.planning.plan import make_plan

MIX = {"recap": 2, "short": 1, "original": 1}
LACKING = 600  # rows that have no caption "short"


@pytest.fixture
def plan(own_pool, tmp_path):
    """A plan of 1,000 samples, half of them each epoch; "recap" has captions for all, "short" for the first ones."""
    for name, rows in (("recap", 1000), ("short", LACKING)):
        table = {"key": [f"{row:06d}" for row in range(rows)], "caption": [f"{name} {row}" for row in range(rows)]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        join_captions(own_pool, [tmp_path / f"{name}.parquet"], CaptionsRequest(name=name))
    return make_plan(own_pool, "mixed", PlanRequest(method="random", keep=0.5, seed=4))


def expected(seed, epoch, row):
    """The caption of a draw, computed without the loader; and whether the sample lacks the one that was drawn."""
    place = int(hash_range(stream_key(seed, "captions", epoch), row, 1)[0]) / 2**64
    name = next(name for name, end in (("original", 0.25), ("recap", 0.75), ("short", 1.0)) if place < end)
    lacks = name == "short" and row >= LACKING
    return ("caption" if lacks or name == "original" else name) + f" {row}", lacks


def drawn(batches):
    """Captions by position; and how many lacked the drawn one."""
    found = {}
    for batch in batches:
        for at, row, epoch, text, name in zip(
            batch.positions.tolist(),
            batch.rows.tolist(),
            batch.epochs.tolist(),
            batch.texts,
            batch.captions,
            strict=True,
        ):
            assert text == ("caption" if name == "original" else name) + f" {row}"
            found[at] = (row, epoch, text)
    return found, sum(batch.without_caption for batch in batches)


def test_a_draw_is_a_function_of_seed_epoch_and_sample(plan):
    loader = Loader(plan, batch_size=16, seed=7, captions=MIX)
    batches = [next(iter(loader)) for _ in range(90)]
    found, lacking = drawn(batches)
    assert {epoch for _, epoch, _ in found.values()} == {0, 1, 2}
    told = [expected(7, epoch, row) for row, epoch, _ in found.values()]
    assert [text for *_, text in found.values()] == [text for text, _ in told]
    assert lacking == sum(lacks for _, lacks in told) == loader.without_caption > 20
    counts = Counter(text.split()[0] for text, lacks in told if not lacks)
    assert abs(counts["recap"] / len(told) - 0.5) < 0.05
    by_row = {}
    for row, _, text in found.values():
        by_row.setdefault(row, set()).add(text)
    assert any(len(texts) > 1 for texts in by_row.values())  # epochs differ

    parts = [Loader(plan, batch_size=8, rank=rank, world_size=2, workers=2, seed=7, captions=MIX) for rank in (0, 1)]
    again = [[next(iter(part)) for _ in range(40)] for part in parts]
    assert drawn(again[0] + again[1])[0] == {at: value for at, value in found.items() if at < 640}
    state = json.loads(json.dumps(parts[0].state_dict()))
    resumed = Loader(plan, batch_size=16, seed=7, captions={"original": 0.25, "short": 0.25, "recap": 0.5})
    resumed.load_state_dict(state)
    assert drawn([next(iter(resumed)) for _ in range(10)])[0] == {at: found[at] for at in range(640, 800)}
    assert resumed.without_caption > state["without_caption"]
    for part in parts:
        part.close()


def test_states_of_other_captions_are_refused(plan, tmp_path):
    def state(captions):
        return Loader(plan, batch_size=16, captions=captions).state_dict()

    plain, mixed = state(None), state({"recap": 1, "original": 1})
    assert plain["order"] == state({"original": 3})["order"] != mixed["order"]
    assert (
        len({plain["order"], mixed["order"], state({"recap": 1})["order"], state({"recap": 2, "original": 1})["order"]})
        == 4
    )
    with pytest.raises(UserError, match="captions"):
        Loader(plan, batch_size=16).load_state_dict(mixed)
    folder = plan.catalog.folder / "captions" / "recap"
    folder.rename(tmp_path / "old")
    pq.write_table(pa.table({"key": ["000001"], "caption": ["other"]}), tmp_path / "other.parquet")
    join_captions(plan.catalog, [tmp_path / "other.parquet"], CaptionsRequest(name="recap"))
    assert state({"recap": 1, "original": 1})["order"] != mixed["order"]
    with pytest.raises(UserError, match="no captions named 'none'"):
        state({"none": 1})


def test_a_replacement_has_its_own_caption(plan, own_pool, tmp_path):
    tar = tmp_path / "pool" / "00001.tar"
    content = bytearray(tar.read_bytes())
    rows = own_pool.samples(own_pool.parts()[0], ["image_offset", "image_bytes", "shard"]).to_pylist()
    for row in rows[1:91:3]:
        content[row["image_offset"] : row["image_offset"] + row["image_bytes"]] = bytes(row["image_bytes"])
    tar.write_bytes(content)
    loader = Loader(plan, batch_size=10, check="none", transform=lambda image: 0, captions=MIX, max_replaced=1)
    batches = [next(iter(loader)) for _ in range(50)]
    assert loader.replaced > 5
    found, _ = drawn(batches)
    assert [text for *_, text in found.values()] == [expected(0, epoch, row)[0] for row, epoch, _ in found.values()]


def test_an_epoch_as_a_dataset_has_the_loaders_captions(plan):
    dataset = EpochDataset(plan, batch_size=8, epoch=3, seed=7, captions=MIX)
    samples = dataset.__getitems__(range(len(dataset)))
    assert [sample["text"] for sample in samples] == [expected(7, 3, sample["row"])[0] for sample in samples]
    assert {sample["caption"] for sample in samples} == {"recap", "short", "original"}
    assert "caption" not in EpochDataset(plan, batch_size=8)[0]


def test_a_webdataset_pipeline_has_the_draws_of_the_plans_seed(plan, own_pool):
    paths = own_pool.shards()["path"].to_pylist()
    samples = [
        {"__url__": paths[row["shard"]], "__key__": row["key"], "txt": row["caption"].encode()}
        for part in own_pool.parts()
        for row in own_pool.samples(part, ["shard", "key", "caption"]).to_pylist()
    ]
    stage = pickle.loads(pickle.dumps(select(plan, 2, captions=MIX)))
    passed = list(stage(samples))
    assert [int(sample["__key__"]) for sample in passed] == np.flatnonzero(plan.draw(2, slice(0, 1000))).tolist()
    assert [sample["txt"].decode() for sample in passed] == [
        expected(4, 2, int(sample["__key__"]))[0] for sample in passed
    ]
    assert {sample["__caption__"] for sample in passed} == {"original", "recap", "short"}
    assert all(sample in samples for sample in select(plan, 2)(samples))
    with pytest.raises(UserError, match="no captions named 'none'"):
        select(plan, captions={"none": 1})


def test_exported_shards_have_the_draws_of_the_plans_seed(plan, tmp_path):
    sharding = ExportRequest(200, workers=1, captions="recap:2,short:1,original:1")
    export(plan, "shards", tmp_path / "out", epoch=1, request=sharding)
    texts = {}
    for tar in (tmp_path / "out").glob("*.tar"):
        sidecar = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        assert read_shard(str(tar)).samples["caption"].to_pylist() == [row["caption"] for row in sidecar]
        for row in sidecar:
            number = int(row["source_key"])
            texts[number] = row["caption"]
            assert row["caption_name"] == {"caption": "original"}.get(word := row["caption"].split()[0], word)
    assert texts == {row: expected(4, 1, row)[0] for row in np.flatnonzero(plan.draw(1, slice(0, 1000))).tolist()}
    with pytest.raises(UserError, match="`captions` does nothing in an export to keys: it is for urls, shards"):
        export(plan, "keys", tmp_path / "keys.txt", epoch=1, request=ExportRequest(captions="recap"))
    with pytest.raises(UserError, match=r"something else \(other: captions, joined\)"):
        export(plan, "shards", tmp_path / "out", epoch=1, request=ExportRequest(200))


@pytest.mark.parametrize(
    "given",
    ["recap:0", "recap:-1", "recap:x", "recap:inf", "recap:nan", ":1", "recap:1,recap:2", ",",
     {"recap": 0}, {"recap": "x"}, {1: 1.0}, {"a": None}],
)  # fmt: skip
def test_impossible_weights_are_refused(given):
    with pytest.raises(UserError, match="`captions`"):
        caption_weights(given)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=1), st.integers(0, 2**40), st.integers(0, 99)
)
def test_weights_are_shares_in_any_order(weights, first, epoch):
    shares = caption_weights(weights)
    assert shares == caption_weights(dict(reversed(weights.items()))) and list(shares) == sorted(weights)
    assert caption_weights(",".join(f"{name}:{weight!r}" for name, weight in weights.items())) == shares
    mix = CaptionMix.__new__(CaptionMix)
    mix.names, mix._seed, mix._ends = list(shares), 5, np.cumsum(list(shares.values()))[:-1]
    rows, epochs = first + np.arange(4000), np.full(4000, epoch, np.int32)
    chosen = mix.choose(rows, epochs)
    order = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(mix.choose(rows[order], epochs), chosen[order])
    found = np.bincount(chosen, minlength=len(shares)) / 4000
    assert np.abs(found - list(shares.values())).max() < 0.05
