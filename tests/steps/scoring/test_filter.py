import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailwise.catalog import Catalog
from tailwise.catalog.drops import DROPPED_SCHEMA, DropList, Survivors
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.requests import ClusterRequest, FilterRequest, ScoreRequest
from tailwise.steps.clustering.cluster import cluster
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.scoring.filter import filter_samples, try_filter
from tailwise.steps.scoring.scores import SCORES

ROWS = 30
KEYS = [f"{shard:05d}{sample:04d}" for shard in range(3) for sample in range(10)]
NUMBERS = itertools.count()
# Few different values, so that ties are the rule; and no score at all.
values = st.lists(
    st.sampled_from([0.0, -0.0, 0.25, 0.3, -1.0, 5.0, float("inf"), float("nan")]), min_size=ROWS, max_size=ROWS
).map(lambda items: np.array(items, np.float32))


@pytest.fixture(scope="session")
def pools(tmp_path_factory, make_pool):
    """The same 30 samples in catalogs of one part and of three."""
    folder = tmp_path_factory.mktemp("filters")
    make_pool(folder / "pool", [10, 10, 10])
    for part_rows in (10, 1000):
        import_pool([str(folder / "pool")], folder / str(part_rows), workers=1, part_rows=part_rows)
    catalogs = [Catalog.open(folder / str(part_rows)) for part_rows in (10, 1000)]
    assert [len(catalog.parts()) for catalog in catalogs] == [3, 1]
    return folder, catalogs


def given_scores(folder, scores):
    """A request for these scores, from a file."""
    path = folder / f"scores-{next(NUMBERS)}.parquet"
    pq.write_table(pa.table({"key": KEYS, "q": pa.array(scores, pa.float64())}), path)
    return ScoreRequest("q", {"file": str(path)})


def test_keys_of_a_file_that_match_no_sample_are_counted(pools, tmp_path):
    _, catalogs = pools
    keys = [*KEYS, "stranger", "another"]
    pq.write_table(pa.table({"key": keys, "q": np.arange(32.0)}), tmp_path / "s.parquet")
    request = ScoreRequest("q", {"file": str(tmp_path / "s.parquet")})
    for catalog in catalogs:
        made = filter_samples(catalog, FilterRequest(request, keep=0.5, name="strangers"))
        for summary in (made.summary, try_filter(catalog, FilterRequest(request)).summary):
            assert [summary[name] for name in ("names", "names_matched", "samples_matched")] == [32, 30, 30]
            assert summary["matched_by"] == "key"
        strict = FilterRequest("q", keep=0.5, file=tmp_path / "s.parquet", strict=0.95, name="strict")
        with pytest.raises(UserError, match=r"2 of 32 names in .*, such as 'stranger',|less than `strict` 0.95"):
            filter_samples(catalog, strict)
        assert filter_samples(catalog, replace(strict, strict=0.93)).summary["kept"] == 15


def apply(catalog, request, rule, without=()):
    """The mask of what a new filter drops; checks that its files and figures agree."""
    name = f"f{next(NUMBERS)}"
    made = filter_samples(catalog, replace(rule, by=request, name=name, without=without))
    found = DropList(catalog, name)
    table = found.tables(slice(0, ROWS))
    assert table.schema == DROPPED_SCHEMA
    assert table["row"].to_pylist() == np.flatnonzero(found.mask[:]).tolist()
    summary = made.summary
    assert (summary["dropped"], summary["kept"]) == (found.mask[:].sum(), summary["samples"] - found.mask[:].sum())
    assert sum(summary["reasons"].values()) == summary["dropped"]
    assert try_filter(catalog, replace(rule, by=request, without=without)).summary == summary
    return found, table


def plain_kept(scores, part, rule):
    """Which of the rows `part` stay: sorted and cut, row by row."""
    rows = [row for row in np.flatnonzero(part) if not np.isnan(scores[row])]
    if rule.keep is not None:
        rows = sorted(rows, key=lambda row: (-scores[row], row))[: round(rule.keep * ROWS)]
    if rule.keep_lowest is not None:
        rows = sorted(rows, key=lambda row: (scores[row], row))[: round(rule.keep_lowest * ROWS)]
    if rule.minimum is not None:
        rows = [row for row in rows if scores[row] >= np.float32(rule.minimum)]
    if rule.maximum is not None:
        rows = [row for row in rows if scores[row] <= np.float32(rule.maximum)]
    if rule.missing == "keep":
        rows += [row for row in np.flatnonzero(part) if np.isnan(scores[row])]
    kept = np.zeros(ROWS, np.bool_)
    kept[rows] = True
    return kept


shares = st.sampled_from([0.05, 0.1, 1 / 3, 0.5, 0.75, 1.0])
bounds = st.sampled_from([-2.0, 0.0, 0.25, 0.3, 1.0, 7.0])
rules = st.one_of(
    st.builds(
        lambda share, missing: FilterRequest("", keep=share, missing=missing), shares, st.sampled_from(["drop", "keep"])
    ),
    st.builds(lambda share: FilterRequest("", keep_lowest=share), shares),
    st.builds(
        lambda bound, missing: FilterRequest("", bound, missing=missing), bounds, st.sampled_from(["drop", "keep"])
    ),
    st.builds(lambda bound: FilterRequest("", maximum=bound), bounds),
    st.builds(lambda a, b: FilterRequest("", min(a, b), max(a, b)), bounds, bounds),
)


@given(values, rules, st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
@settings(max_examples=15, deadline=None)
def test_a_filter_drops_what_a_plain_reference_drops(pools, scores, rule, earlier):
    folder, catalogs = pools
    request = given_scores(folder, np.where(np.isnan(scores).all(), 1.0, scores))
    scores = np.where(np.isnan(scores).all(), np.float32(1), scores)
    other = given_scores(folder, np.array(earlier, float))
    found = []
    for catalog in catalogs:
        without, part = [], np.ones(ROWS, np.bool_)
        if not all(earlier):
            before, _ = apply(catalog, other, FilterRequest("", maximum=0))
            without, part = [before.name], ~before.mask[:]
        kept = plain_kept(scores, part, rule)
        share = rule.keep or rule.keep_lowest
        scored = int((~np.isnan(scores[part])).sum())
        too_many = share is not None and round(share * ROWS) > scored
        if not scored or not kept.any() or too_many:
            with pytest.raises(
                UserError, match=r"would be dropped|not one of|take part and \d+ of these have a q: the largest"
            ):
                filter_samples(catalog, replace(rule, by=request, name=f"f{next(NUMBERS)}", without=without))
            continue
        drops, table = apply(catalog, request, rule, without)
        assert np.array_equal(drops.mask[:], part & ~kept)
        # A list brings along those that it was made without.
        assert np.array_equal(Survivors(catalog, [drops.name], catalog.snapshot()).keeps(slice(0, ROWS)), kept)
        dropped = scores[drops.mask[:]]
        assert np.array_equal(np.isnan(dropped), [reason == "no q" for reason in table["reason"].to_pylist()])
        assert np.array_equal(table["value"].to_numpy(), dropped.astype(np.float64), equal_nan=True)
        assert table["value"].null_count == np.isnan(dropped).sum()
        found.append((drops.mask[:].tolist(), table))
    assert len(found) in {0, 2}
    assert not found or found[0] == found[1]


def test_the_top_share_is_exact_and_ties_go_by_row(pools):
    folder, (catalog, _) = pools
    scores = np.full(ROWS, 0.5)
    scores[[3, 29]] = 0.75
    scores[12] = np.nan
    drops, table = apply(catalog, given_scores(folder, scores), FilterRequest("", keep=0.3))
    assert np.flatnonzero(~drops.mask[:]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 29]  # 0.3 · 30 = 9: of the whole pool
    assert set(table["reason"].to_pylist()) == {"q not among the highest 0.3 of the pool", "no q"}
    drops, table = apply(catalog, given_scores(folder, scores), FilterRequest("", keep_lowest=0.1, missing="keep"))
    assert np.flatnonzero(~drops.mask[:]).tolist() == [0, 1, 2, 12]
    assert set(table["reason"].to_pylist()) == {"q not among the lowest 0.1 of the pool"}


def test_the_rule_of_datacomp_keeps_all_that_equal_its_bound(pools):
    folder, (catalog, _) = pools
    scores = np.arange(ROWS) // 4 / 4
    scores[12] = np.nan
    drops, table = apply(catalog, given_scores(folder, scores), FilterRequest("", keep=0.3, rule="datacomp"))
    bound = np.sort(np.nan_to_num(scores, nan=-1))[::-1][int(ROWS * 0.3)]  # with NaN last, as the toolkit's sort
    np.testing.assert_array_equal(~drops.mask[:], scores >= bound)
    assert (~drops.mask[:]).sum() == 10
    assert set(table["reason"].to_pylist()) == {"q below 1.25", "no q"}
    with pytest.raises(UserError, match="the bound is score 30 from the top, and 29 samples have one"):
        apply(catalog, given_scores(folder, scores), FilterRequest("", keep=0.99, rule="datacomp"))


def test_bounds_are_those_of_the_numbers_that_scores_were_made_from(pools):
    folder, (catalog, _) = pools
    decimals = np.arange(1, ROWS + 1) / 10  # half of them are rounded down in float32, half up
    request = given_scores(folder, decimals)
    for at in range(0, ROWS, 3):
        drops = apply(catalog, request, FilterRequest("", decimals[at]))[0]
        assert np.flatnonzero(drops.mask[:]).tolist() == list(range(at))
        drops = apply(catalog, request, FilterRequest("", maximum=decimals[at]))[0]
        assert np.flatnonzero(drops.mask[:]).tolist() == list(range(at + 1, ROWS))
    _, table = apply(catalog, request, FilterRequest("", 0.35, 2.0))
    reasons = dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
    assert reasons == dict.fromkeys(range(3), "q below 0.35") | dict.fromkeys(range(20, 30), "q above 2")


def test_quantiles_are_order_statistics_of_those_that_take_part(pools):
    folder, (catalog, _) = pools
    scores = np.random.default_rng(0).normal(size=ROWS)
    scores[4] = np.nan
    before, _ = apply(catalog, given_scores(folder, np.arange(ROWS)), FilterRequest("", 10))
    request = given_scores(folder, scores)
    summary = try_filter(catalog, FilterRequest(request, without=[before.name])).summary
    left = np.sort(scores[10:].astype(np.float32))
    expected = [left[round(percent * 19 / 100)] for percent in (0, 1, 5, 10, 25, 75, 90, 95, 99, 100)]
    found = {item["percent"]: item["score"] for item in summary["quantiles"]}
    assert found.pop(50) in left[[9, 10]]
    assert list(found.values()) == expected
    assert {key: summary[key] for key in ("score", "samples", "scored")} == {"score": "q", "samples": 20, "scored": 20}
    assert "dropped" not in summary
    whole = try_filter(catalog, FilterRequest(request)).summary
    assert (whole["samples"], whole["scored"]) == (30, 29)


def test_filters_follow_one_another_and_a_clustering_takes_no_part_in_what_they_drop(small_catalog):
    filter_samples(small_catalog, FilterRequest("caption-characters", maximum=7, name="short"))  # groups 10 and 11
    filter_samples(small_catalog, FilterRequest("image-bytes", keep=0.5, without=["short"]))
    first, second = (DropList(small_catalog, name).mask[:] for name in ("short", "image-bytes"))
    assert first.sum() == 18 + 17
    assert not (first & second).any()
    assert second.sum() == 565 - 300
    made = cluster(small_catalog, ClusterRequest(k=5, without=["image-bytes"]))
    assert made.summary["samples"] == 300
    assert made.summary["dropped"] == 300


def test_a_rerun_does_nothing_and_another_rule_is_refused(small_catalog, tree_bytes):
    made = filter_samples(small_catalog, FilterRequest("caption-words", minimum=1))
    times = {path: path.stat().st_mtime_ns for path in small_catalog.folder.rglob("*")}
    assert filter_samples(small_catalog, FilterRequest("caption-words", minimum=1)) == made
    with pytest.raises(UserError, match="minimum"):
        filter_samples(small_catalog, FilterRequest("caption-words", minimum=2))
    assert times == {path: path.stat().st_mtime_ns for path in small_catalog.folder.rglob("*")}
    before = tree_bytes(small_catalog.folder)
    filter_samples(small_catalog, FilterRequest("caption-words", minimum=2, name="words-2"))  # nothing is below
    after = tree_bytes(small_catalog.folder)
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"drops"}
    assert not DropList(small_catalog, "words-2").mask[:].any()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (FilterRequest(""), "give one of `minimum`"),
        (FilterRequest("", 1, keep=0.5), "give one of `minimum`"),
        (FilterRequest("", keep=0.5, keep_lowest=0.5), "give one of `minimum`"),
        (FilterRequest("", keep=0), "`keep` 0: must be a share above 0"),
        (FilterRequest("", keep_lowest=1.5), "`keep_lowest` 1.5: must be a share above 0"),
        (FilterRequest("", float("nan")), "`minimum` nan"),
        (FilterRequest("", 2, 1), "`minimum` 2 is above `maximum` 1"),
        (FilterRequest("", 1, missing="maybe"), "`missing` 'maybe': use drop or keep"),
        (FilterRequest("", keep=0.5, rule="mine"), "`rule` 'mine': use datacomp"),
        (FilterRequest("", 3), "all of 600 samples would be dropped: caption-words is between 2 and 2"),
        (FilterRequest("", keep=1e-6), "`keep` 1e-06 of the pool of 600 samples is less than one sample"),
    ],
)
def test_bad_rules_are_one_line_and_make_no_list(small_catalog, rule, message):
    with pytest.raises(UserError, match=message) as caught:
        filter_samples(small_catalog, replace(rule, by="caption-words"))
    assert "\n" not in str(caught.value)
    assert not list((small_catalog.folder / "drops").glob("*/manifest.json"))


def test_a_score_that_nobody_has_is_an_error(small_catalog):
    for make in (
        lambda: filter_samples(small_catalog, FilterRequest("width", minimum=1)),
        lambda: try_filter(small_catalog, FilterRequest("width")),
    ):
        with pytest.raises(UserError, match="not one of 600 samples has a width"):
            make()


def run(*arguments):
    """The command in this process; a mistake is raised."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(small_catalog):
    catalog = small_catalog.folder
    assert "caption-characters of 600 samples" in run("filter", catalog, "--by", "caption-characters", "--dry-run")
    told = run("filter", catalog, "--by", "caption-characters", "--max", 7, "--dry-run")
    assert "would drop 35 of 600 samples" in told
    assert not (catalog / "drops").exists()
    told = run("filter", catalog, "--by", "caption-characters", "--max", 7, "--name", "short")
    assert "35: caption-characters above 7" in told
    assert "drop list 'short': drops 35 of 600 samples; 565 stay, 94.2 % of the pool of 600" in told.replace("%", " %")
    with pytest.raises(UserError, match=r"other settings \(--max 7\.0 → not given, --min not given → 3\.0\): "):
        run("filter", catalog, "--by", "caption-characters", "--min", 3, "--name", "short")
    options = ("--by", "image-bytes", "--keep", 0.5, "--without", "short", "--json")
    figures = json.loads(run("filter", catalog, *options))
    assert (figures["name"], figures["samples"], figures["kept"]) == ("image-bytes", 565, 300)
    with pytest.raises(UserError, match="--seed does nothing with the score 'image-bytes'"):
        run("filter", catalog, "--by", "image-bytes", "--seed", 1, "--min", 1)
    with pytest.raises(UserError, match="--missing does nothing without"):
        run("filter", catalog, "--by", "image-bytes", "--missing", "keep", "--dry-run")
    with pytest.raises(UserError, match="--name does nothing with --dry-run"):
        run("filter", catalog, "--by", "image-bytes", "--name", "x", "--dry-run")


def test_a_mistake_is_one_line_and_exit_code_2(run_tailwise, small_catalog):
    result = run_tailwise("filter", small_catalog.folder, "--by", "caption-words", "--min", "3", code=2)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("tailwise: all of 600 samples would be dropped")


def test_help_names_every_score():
    told = run("filter", "--help")
    assert [name for name in SCORES if name not in told] == []
