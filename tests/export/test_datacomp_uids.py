"""The resharder finds samples by the uid in their .json: each uid of the file must stand there, and belong to one sample."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.errors import UserError
from tailwise.export import export, export_figures, files
from tailwise.requests import PlanRequest
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def pool(tmp_path, make_tar, make_image):
    """`pool(*shards)` imports tars whose samples have these uids in their .json: whole numbers, None for none, "-" for no .json."""

    def make(*shards, sidecar=None):
        for number, uids in enumerate(shards):
            members = []
            for at, uid in enumerate(uids):
                key = f"{number:05d}{at:04d}"
                members += [(f"{key}.jpg", make_image()), (f"{key}.txt", b"c")]
                if uid != "-":
                    members.append((f"{key}.json", json.dumps({} if uid is None else {"uid": f"{uid:032x}"}).encode()))
            make_tar(tmp_path / "pool" / f"{number:05d}.tar", members)
        if sidecar is not None:
            pq.write_table(pa.table(sidecar), tmp_path / "pool" / "00000.parquet")
        return import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=3).catalog

    return make


def plan_of(catalog, rates):
    path = catalog.folder.parent / "rates.json"
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"])["key"].to_pylist()]
    path.write_text(json.dumps(dict(zip(keys, rates, strict=True))))
    return make_plan(catalog, "p", PlanRequest("rates", rates=path))


def test_given_uids_are_written_as_often_as_their_samples_are_drawn(pool, tmp_path):
    plan = plan_of(pool([7 << 64, 256], [1, 0]), [1, 2, 0, 1])
    assert export(plan, "datacomp", tmp_path / "s.npy") == 4
    assert np.load(tmp_path / "s.npy").tolist() == [(0, 0), (0, 256), (0, 256), (7, 0)]


@pytest.mark.parametrize(
    ("shards", "rates"),
    [
        (([1, None], [2, 3]), [1, 1, 1, 1]),
        (([1, 2], [3, "-"]), [0, 0, 0, 1]),
        ((["-", 2], [3, 4]), [2, 0, 0, 0]),
    ],
)
def test_samples_without_a_uid_are_refused(pool, tmp_path, shards, rates):
    plan = plan_of(pool(*shards), rates)
    with pytest.raises(
        UserError, match=r"by the uid in their \.json, and sample '0000[01]000[01]' of .*tar has none: export `to`"
    ):
        export(plan, "datacomp", tmp_path / "s.npy")
    assert not (tmp_path / "s.npy").exists()


def test_samples_without_a_uid_that_are_not_drawn_do_no_harm(pool, tmp_path):
    assert export(plan_of(pool([1, None], [2, "-"]), [1, 0, 1, 0]), "datacomp", tmp_path / "s.npy") == 2


def test_a_uid_of_the_sidecar_alone_does_not_stand_in_the_tar(pool, tmp_path):
    catalog = pool(["-"], [2], sidecar={"key": ["000000000"], "uid": [f"{5:032x}"]})
    with pytest.raises(UserError, match="has none"):
        export(plan_of(catalog, [1, 1]), "datacomp", tmp_path / "s.npy")


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_uids_come_sorted_whatever_the_buckets(pool, tmp_path, monkeypatch, rows):
    random = np.random.default_rng(3)
    numbers = [int(number) << 64 | at for at, number in enumerate(random.integers(0, 1 << 64, 40, np.uint64))]
    rates = random.integers(0, 4, 40).tolist()
    plan = plan_of(pool(numbers[:25], numbers[25:]), rates)
    monkeypatch.setattr(files, "BUCKET_ROWS", rows)
    assert export(plan, "datacomp", tmp_path / "s.npy") == sum(rates)
    drawn = sorted(number for number, rate in zip(numbers, rates, strict=True) for _ in range(rate))
    expected = np.array([(number >> 64, number & (1 << 64) - 1) for number in drawn], "u8,u8")
    np.save(tmp_path / "expected.npy", expected)
    assert (tmp_path / "s.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


@pytest.mark.parametrize("rates", [[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])  # the other one may not be drawn
def test_a_uid_of_two_samples_is_refused(pool, tmp_path, rates):
    plan = plan_of(pool([256, 9], [8, 256]), rates)
    message = rf"1 uids .* such as {256:032x} to '000000000' of .*00000\.tar and '000010001' of .*00001\.tar"
    with pytest.raises(UserError, match=message):
        export(plan, "datacomp", tmp_path / "s.npy")
    assert not (tmp_path / "s.npy").exists()


def test_an_epoch_is_named_where_epochs_differ(pool, tmp_path):
    catalog = pool([1, 2, 3, 4])
    half, whole = (make_plan(catalog, f"k{keep}", PlanRequest("random", keep=keep)) for keep in (0.5, 1.0))
    once = make_plan(catalog, "once", PlanRequest("random", keep=0.5, dynamic=False))
    for name in ("datacomp", "keys", "parquet", "shards"):
        with pytest.raises(UserError, match=r"the epochs of plan 'k0\.5' differ: name the one to write with `epoch`"):
            export(half, name, tmp_path / "x")
        for at, plan in enumerate((whole, once)):
            assert export(plan, name, tmp_path / f"{name}-{at}") == (4, 2)[at]
        assert export(half, name, tmp_path / f"{name}-2", epoch=3) == 2
    assert export(half, "rates-json", tmp_path / "r.json") == 4  # rates are those of all epochs
    assert not plan_of(catalog, [0, 1, 2, 0]).changes


def test_the_share_that_a_reader_of_rates_loses_is_told(pool, tmp_path):
    plan = plan_of(pool([1, 2, 3, 4]), [0.5, 1.0, 2.0, 2.5])
    assert export_figures(plan, "rates-json") == {"rates_above_one": 2, "short_share": pytest.approx(1 - 3.5 / 6)}
    assert export_figures(plan, "keys", epoch=1) == {}
