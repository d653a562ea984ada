import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.errors import UserError
from tailwise.plan.explain import explain
from tailwise.requests import PlanRequest
from tailwise.steps.planning.plan import make_plan


@pytest.fixture
def rates():
    return np.random.default_rng(0).choice([0.0, 0.25, 0.5, 1.0, 1.5, 20.0], 600)


def keys():
    return [f"{row:06d}" for row in range(600)]


def write_json(path, rates):
    path.write_text(json.dumps(dict(zip(keys(), rates.tolist(), strict=True))))
    return path


def test_a_dynamics_json_is_drawn_by_its_rates(small_catalog, tmp_path, rates):
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=write_json(tmp_path / "r.json", rates)))
    assert np.array_equal(plan.rates[:], rates.astype(np.float32))
    draws = np.stack([plan.draw(epoch) for epoch in range(400)]).astype(float)
    assert (draws >= np.floor(rates)).all()
    assert (draws <= np.ceil(rates)).all()
    spread = np.sqrt(0.25 / 400)
    assert np.abs(draws.mean(0) - rates).max() < 5 * spread
    assert not np.array_equal(draws[0], draws[1])


@pytest.mark.parametrize("identifier", ["key", "image_path", "uid"])
def test_a_parquet_column_is_joined_by_any_identifier(small_catalog, tmp_path, rates, identifier):
    names = keys()
    if identifier == "uid":
        parts = [small_catalog.samples(part, ["uid"])["uid"].to_pylist() for part in small_catalog.parts()]
        names = [uid.hex() for part in parts for uid in part]
    order = np.random.default_rng(1).permutation(600)
    table = pa.table({identifier: [names[row] for row in order], "p": pa.array(rates[order], pa.float32())})
    pq.write_table(table, tmp_path / "r.parquet")
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.parquet", rate_column="p"))
    assert np.array_equal(plan.rates[:], rates.astype(np.float32))


def test_missing_rates_are_an_error_until_they_are_given_one(small_catalog, tmp_path, rates):
    some = dict(zip(keys()[:590], rates[:590].tolist(), strict=True)) | {"stranger": 0.5}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(some))
    with pytest.raises(UserError, match=r"10 of 600 samples have no rate \(1 rates belong to no sample\)"):
        make_plan(small_catalog, "p", PlanRequest("rates", rates=path))
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=path, missing_rate=0.125))
    assert plan.rates[590:].tolist() == [0.125] * 10
    assert plan.manifest["summary"]["rates_without_sample"] == 1
    assert "joining" not in {item.name for item in plan.folder.iterdir()}


def test_rates_of_another_pool_are_refused(small_catalog, tmp_path):
    rates = {f"stranger {key}" if row % 4 == 0 else key: 0.5 for row, key in enumerate(keys())}
    (tmp_path / "r.json").write_text(json.dumps(rates))
    told = (
        r"150 of 600 rows \(25.0%\) belong to no sample, such as 'stranger 000000', and 150 of 600 samples \(25.0%\) have no rate, "
        "both more than `max_rejected` 0.1"
    )
    with pytest.raises(UserError, match=told):
        make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json", missing_rate=0.0))
    with pytest.raises(UserError, match="`max_rejected` 7: must lie between 0 and 1"):
        make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json", missing_rate=0.0, max_rejected=7))
    plan = make_plan(
        small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json", missing_rate=0.0, max_rejected=0.25)
    )
    figures = {"matched_by": "key", "names": 600, "names_matched": 450, "samples_matched": 450}
    assert plan.manifest["summary"] == {"pool": 600, "eligible": 450, "rates_without_sample": 150, **figures}


def test_static_rates_draw_the_same_every_epoch(small_catalog, tmp_path, rates):
    plan = make_plan(
        small_catalog, "p", PlanRequest("rates", rates=write_json(tmp_path / "r.json", rates), dynamic=False)
    )
    assert np.array_equal(plan.draw(0), plan.draw(9))


def test_explain_gives_expected_values(small_catalog, tmp_path, rates):
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=write_json(tmp_path / "r.json", rates)))
    explanation = explain(plan, 3)
    assert not explanation.exact
    last = explanation.epochs[2]
    assert last.total == pytest.approx(rates.sum())
    assert last.unique == pytest.approx(np.minimum(rates, 1).sum())
    assert last.covered == pytest.approx((1 - (1 - np.minimum(rates, 1)) ** 3).sum())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"000000": -0.5}', "rate of '000000' is -0.5"),
        ('{"000000": 256}', "rate of '000000' is 256"),
        ('{"000000": NaN}', "not a JSON object"),
        ('{"000000": "often"}', "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("{}", "600 of 600 samples have no rate"),
        ('{"000000": true}', "value of '000000' is True"),
        ('{"000000": "0.5"}', "value of '000000' is '0.5'"),
        ('{"000000": 0.5, "000000": 0.25}', "rate of '000000' is given twice"),
        ("{", "not a JSON object"),
    ],
)
def test_bad_files_are_one_line(small_catalog, tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json"))
    assert "\n" not in str(caught.value)


def test_other_bad_arguments(small_catalog, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "r.parquet")
    (tmp_path / "r.bin").write_text("key,rate")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, message in {
        "none.json": "is no file: rates are read from .json",
        "r.bin": "rates are read from .json, .npy, .txt, .parquet, .csv, .tsv, .jsonl",
        "r.parquet": "needs the column 'rate' and one of uid, shard, key, image_path, sha256, md5, url; it has x",
        "broken.parquet": "can't be read as Parquet",
    }.items():
        with pytest.raises(UserError, match=message):
            make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / name))
    with pytest.raises(UserError, match="`missing_rate` -1"):
        make_plan(small_catalog, "p", PlanRequest("rates", rates=tmp_path / "r.parquet", missing_rate=-1))


def test_ambiguous_keys_are_refused(tmp_path, make_tar, make_image):
    from tailwise.steps.importing.pool import import_pool

    for shard in ("a", "b"):
        make_tar(tmp_path / shard / "00000.tar", [("k.jpg", make_image()), ("k.txt", b"c")])
    catalog = import_pool([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "catalog", workers=1).catalog
    (tmp_path / "r.json").write_text('{"k": 0.5}')
    with pytest.raises(UserError, match="'k' belongs to several samples"):
        make_plan(catalog, "p", PlanRequest("rates", rates=tmp_path / "r.json"))


@pytest.mark.parametrize("rate", ["[" * 100_000 + "]" * 100_000, "1" + "0" * 400, "1e999", '{"a": 1}'])
def test_hostile_rates_are_one_line(small_catalog, tmp_path, rate):
    (tmp_path / "r.json").write_text('{"000000": ' + rate + "}")
    with pytest.raises(UserError, match=r"not a JSON object|must lie between") as caught:
        make_plan(small_catalog, "r", PlanRequest("rates", rates=tmp_path / "r.json"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("dynamic", [True, False])
def test_rates_have_exact_counts_under_stream(small_catalog, tmp_path, rates, dynamic):
    path = write_json(tmp_path / "r.json", rates)
    plan = make_plan(small_catalog, "p", PlanRequest("rates", rates=path, draw="stream", dynamic=dynamic))
    assert not plan.by_rate and not plan.has_clusters
    np.testing.assert_allclose(
        plan.rate(slice(0, 600)), rates, rtol=0.1
    )  # the sum is rounded; rates of 0.25 give 24 samples
    budget = round(rates.sum())
    for epoch in range(4):
        copies = plan.draw(epoch)
        assert copies.sum() == budget
        assert (np.abs(copies - plan.rate(slice(0, 600))) < 1).all()
        for value in (0.5, 1.0, 1.5, 20.0):
            assert copies[rates == value].sum() == pytest.approx((rates == value).sum() * value, abs=8)
    assert np.array_equal(plan.draw(0), plan.draw(1)) != dynamic
    truncated = make_plan(small_catalog, "q", PlanRequest("rates", rates=path, draw="stream", above_one="truncate"))
    assert truncated.draw(0).max() == 1 and truncated.draw(0).sum() == round(np.minimum(rates, 1).sum())


def test_rates_that_sum_to_no_sample_cannot_be_streamed(small_catalog, tmp_path):
    path = write_json(tmp_path / "r.json", np.full(600, 0.0005))
    with pytest.raises(UserError, match="the rates sum to 0 samples"):
        make_plan(small_catalog, "p", PlanRequest("rates", rates=path, draw="stream"))


def test_whole_rates_are_the_same_epoch_each_time_and_said_so(small_catalog, tmp_path, run_tailwise):
    (tmp_path / "twice.txt").write_text("000001\n000001\n000002\n")
    (tmp_path / "half.json").write_text(json.dumps({"000001": 0.5}))
    told = run_tailwise("plan", small_catalog.folder, "twice", "--rates", tmp_path / "twice.txt").stdout
    assert "plan 'twice', the same every epoch: budget 3 of 600 samples" in told
    told = run_tailwise("explain", small_catalog.folder, "twice", "--samples-seen", "30").stdout
    assert "the same samples in each epoch; seed 0" in told and "epochs (exact counts)" in told
    assert "15 passes over each of 2 kept samples on average; 2 are seen at least once" in told
    run_tailwise("plan", small_catalog.folder, "half", "--rates", tmp_path / "half.json", "--missing-rate", "1")
    told = run_tailwise("explain", small_catalog.folder, "half").stdout
    assert "another draw in each epoch; each sample drawn by chance" in told and "expected counts" in told
