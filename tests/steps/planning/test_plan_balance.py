import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import digest
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.explain import explain
from tailwise.requests import PlanRequest
from tailwise.steps.drops import write_drops
from tailwise.steps.grouping.match import match_entries, read_entries, spellings_digest
from tailwise.steps.planning.balance import make_balanced_plan, solve_increasing
from tailwise.steps.upkeep.remove import remove


@pytest.fixture
def plain_rates(matched):
    """MetaCLIP's two steps, in plain Python."""

    def rates(captions, limit):
        found = [matched(caption) for caption in captions]
        counts = Counter(itertools.chain(*found))
        return [1 - np.prod([1 - min(1, limit / counts[entry]) for entry in each]) for each in found], counts

    return rates


@pytest.mark.parametrize("limit", [1, 7, 40, 10_000])
def test_rates_are_those_of_the_plain_algorithm(captioned, captions, entries, limit, plain_rates, matched, listed):
    plan = make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=limit))
    rates, counts = plain_rates(captions, limit)
    np.testing.assert_allclose(plan.rates[:], rates, rtol=1e-6)
    table = pq.read_table(plan.folder / "entries.parquet").to_pydict()
    assert table["entry"] == listed
    assert table["count"] == [counts[entry] for entry in listed]
    summary = plan.manifest["summary"]
    assert summary["entries_without_match"] == 2
    assert summary["entries_thinned"] == sum(count > limit for count in counts.values())
    assert summary["matched"] == summary["eligible"] == sum(map(bool, map(matched, captions)))
    assert summary["expected"] == pytest.approx(sum(rates), rel=1e-6)


def test_samples_without_an_entry_are_never_drawn_and_it_draws_once(captioned, captions, entries, matched):
    plan = make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=3))
    assert plan.rates[:2].tolist() == [0, 0]
    assert np.array_equal(plan.draw(0), plan.draw(5))
    assert plan.draw(0)[[not matched(caption) for caption in captions]].sum() == 0
    fresh = make_balanced_plan(captioned, "q", PlanRequest("text-balance", entries=entries, per_entry=3, dynamic=True))
    draws = np.stack([fresh.draw(epoch) for epoch in range(300)])
    assert not np.array_equal(draws[0], draws[1])
    assert np.abs(draws.mean(0) - fresh.rates[:]).max() < 5 * np.sqrt(0.25 / 300)
    assert explain(fresh, 1).epochs[0].total == pytest.approx(fresh.manifest["summary"]["expected"])


def test_the_limit_follows_from_the_budget(captioned, captions, entries, plain_rates, matched):
    can_be = sum(map(bool, map(matched, captions)))
    for number, wanted in enumerate((1, 20, 77, can_be - 1, can_be)):
        plan = make_balanced_plan(captioned, f"p{number}", PlanRequest("text-balance", entries=entries, budget=wanted))
        assert plan.rates[:].sum(dtype=float) == pytest.approx(wanted, abs=0.5001)
        rates, _ = plain_rates(captions, plan.manifest["summary"]["per_entry"])
        np.testing.assert_allclose(plan.rates[:], rates, rtol=1e-6)
    share = make_balanced_plan(captioned, "share", PlanRequest("text-balance", entries=entries, keep=0.25))
    assert share.rates[:].sum(dtype=float) == pytest.approx(round(0.25 * 173), abs=0.5001)  # of all captions
    assert share.config["budget"] == round(0.25 * 173)


def test_what_was_removed_is_neither_counted_nor_drawn(captioned, captions, entries, tmp_path, plain_rates):
    make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=5))
    gone = [2, 50, 51, 172]
    (tmp_path / "gone.txt").write_text("\n".join(f"{row:05d}" for row in gone))
    remove(captioned, tmp_path / "gone.txt")
    old = make_balanced_plan(
        captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=5)
    )  # what was finished stays as it is
    assert old.rates[:][gone].any()
    plan = make_balanced_plan(captioned, "q", PlanRequest("text-balance", entries=entries, per_entry=5))
    left = [caption for row, caption in enumerate(captions) if row not in gone]
    assert not plan.rates[:][gone].any()
    np.testing.assert_allclose(np.delete(plan.rates[:], gone), plain_rates(left, 5)[0], rtol=1e-6)


def test_what_was_dropped_is_neither_counted_nor_drawn(captioned, captions, entries, plain_rates):
    dropped = list(range(0, len(captions), 3))
    snapshot = captioned.snapshot()
    config = {"snapshot": 1, "without": []}
    with Artifact(captioned.drops_folder("some"), "filter", config, {"snapshot": snapshot.id}) as artifact:
        rows = [{"row": row, "reason": "test"} for row in dropped]
        write_drops(artifact, captioned.parts(), [pa.Table.from_pylist(rows, DROPPED_SCHEMA)])
        artifact.finish({})
    plan = make_balanced_plan(
        captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=5, without=["some"])
    )
    left = [caption for row, caption in enumerate(captions) if row % 3]
    assert not plan.rates[:][dropped].any()
    np.testing.assert_allclose(np.delete(plan.rates[:], dropped), plain_rates(left, 5)[0], rtol=1e-6)


def test_the_result_is_the_same_with_two_processes(captioned, entries, tree_bytes):
    for name, workers in (("p", 1), ("q", 2)):
        match_entries(captioned, entries, workers=workers)
        make_balanced_plan(captioned, name, PlanRequest("text-balance", entries=entries, budget=50))
        matches = tree_bytes(captioned.folder / "matches")
        for path in (captioned.folder / "matches").glob("*/*"):
            path.unlink()
        if name == "p":
            first = matches
    assert matches == first
    p, q = (tree_bytes(captioned.plan_folder(name)) for name in "pq")
    assert p == q


def test_plans_share_matches_and_matching_goes_on_where_it_was_interrupted(captioned, entries, tree_bytes):
    totals = []

    def stopping(items, description, total=None):
        totals.append(total)
        for number, item in enumerate(items):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    def counting(items, description, total=None):
        if description == "matching captions":
            totals.append(total)
        return items

    with pytest.raises(KeyboardInterrupt):
        match_entries(captioned, entries, workers=1, context=Context(stopping))
    match_entries(captioned, entries, workers=1, context=Context(counting))
    assert totals == [6, 2]  # row groups: the first part's 4 were done
    resumed = tree_bytes(captioned.folder / "matches")
    make_balanced_plan(
        captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=2), context=Context(counting)
    )
    make_balanced_plan(
        captioned, "q", PlanRequest("text-balance", entries=entries, per_entry=3), context=Context(counting)
    )
    assert totals == [6, 2]
    for path in (captioned.folder / "matches").glob("*/*"):
        path.unlink()
    match_entries(captioned, entries)
    assert tree_bytes(captioned.folder / "matches") == resumed


def test_case_counts_unless_ignored(captioned, captions, tmp_path, matched):
    (tmp_path / "e.txt").write_text("CAT\nCat\nzÜRICH\n")
    with pytest.raises(UserError, match=r"not one caption holds one of the 3 entries, such as 'CAT'"):
        make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=tmp_path / "e.txt", per_entry=1))
    plan = make_balanced_plan(
        captioned,
        "q",
        PlanRequest("text-balance", entries=tmp_path / "e.txt", per_entry=10_000, ignore_case=True),
    )
    assert plan.manifest["summary"]["entries"] == 2
    holds = [bool({"cat", "Zürich"} & set(matched(caption))) for caption in captions]
    assert np.array_equal(plan.rates[:], np.array(holds, np.float32))


def test_lists_are_read_from_text_and_json(tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(["b", " a ", "", "b", "  ", "c\nd"]))
    assert list(read_entries(tmp_path / "e.json")) == ["b", " a ", "c\nd"]
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfb\r\n a \n\nb\nA\n")
    assert list(read_entries(tmp_path / "e.txt")) == ["b", "a", "A"]
    assert list(read_entries(tmp_path / "e.txt", ignore_case=True)) == ["b", "a"]
    for name, content, message in (
        ("none.txt", None, "can't be read as a list of entries"),
        ("empty.txt", b"\n \n", "holds 0 entries"),
        ("latin.txt", b"caf\xe9", "can't be read as a list of entries"),
        ("bad.json", b"{", "can't be read as a list of entries"),
        ("half.json", b'["\\ud800"]', "can't be read as a list of entries"),
        ("map.json", b'{"a": 1}', "is not a JSON list of strings"),
        ("mixed.json", b'["a", 1]', "is not a JSON list of strings"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_entries(tmp_path / name)


def test_entries_of_several_spellings(tmp_path):
    (tmp_path / "e.txt").write_text("shirt | Shirts|tee\t12\t3\na\\|b\n\\|\nshirt|Shirts|tee\ntab \t 7\n")
    spelled = {"shirt": 0, "Shirts": 0, "tee": 0, "a|b": 1, "|": 2, "tab": 3}
    assert read_entries(tmp_path / "e.txt") == spelled
    (tmp_path / "e.json").write_text(json.dumps([["shirt", "Shirts", "", "tee"], "a|b", ["|"], [], "tab", "tab"]))
    assert read_entries(tmp_path / "e.json") == spelled
    folded = read_entries(tmp_path / "e.txt", ignore_case=True, plurals=True)
    assert folded == {
        "shirt": 0,
        "shirts": 0,
        "tee": 0,
        "a|b": 1,
        "|": 2,
        "tab": 3,
        "shirtses": 0,
        "tees": 0,
        "a|bs": 1,
        "tabs": 3,
    }
    (tmp_path / "own.txt").write_text("shorts\nshort\nnews")
    assert read_entries(tmp_path / "own.txt", plurals=True) == {
        "shorts": 0, "short": 1, "news": 2, "shortses": 0, "newses": 2, "new": 2
    }  # fmt: skip
    for content, message in (
        ("a|b\nb|c", "'b' spells two entries"),
        ("a\n|b", r"nothing stands beside a \| of '\|b': write \\\| for a bar"),
    ):
        (tmp_path / "bad.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            read_entries(tmp_path / "bad.txt")


def test_matches_of_a_plain_list_keep_their_name():
    """Finished artifacts of catalogs that earlier versions made stay valid."""
    assert spellings_digest({"cat": 0, "dog": 1}) == digest(["cat", "dog"])
    assert spellings_digest({"cat": 0, "dog": 0}) != spellings_digest({"cat": 0, "dog": 1})


def test_synonyms_are_balanced_as_one_entry(captioned, captions, tmp_path):
    (tmp_path / "e.txt").write_text("cat|dog\nrare\n")
    plan = make_balanced_plan(
        captioned, "p", PlanRequest("text-balance", entries=tmp_path / "e.txt", per_entry=5, plurals=True)
    )
    animals = [bool({"cat", "dog"} & set(caption.replace(",", " ").replace("!", " ").split())) for caption in captions]
    rare = ["rare" in caption for caption in captions]
    assert pq.read_table(plan.folder / "entries.parquet").to_pydict()["entry"] == ["cat", "rare"]
    chances = [
        1 - (1 - 5 / sum(animals) * one) * (1 - 5 / sum(rare) * other) for one, other in zip(animals, rare, strict=True)
    ]
    np.testing.assert_allclose(plan.rates[:], chances, rtol=1e-6)
    assert plan.config["plurals"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of `per_entry`"),
        ({"per_entry": 1, "keep": 0.5}, "give one of `per_entry`"),
        ({"per_entry": 0}, "`per_entry` 0: must be at least 1"),
        ({"keep": 0.0}, "`keep` 0.0: must be above 0"),
        ({"keep": 1.5}, "`keep` 1.5"),
        ({"keep": 0.0001}, "`keep` 0.0001 of the pool of 173 samples is less than one sample"),
        (
            {"keep": 1.0},
            r"`keep` 1 asks for 173 samples of the pool of 173, but \d+ have a caption that holds an entry",
        ),
        ({"budget": 0}, "`budget` 0: must lie between 1 and the 173 samples"),
        ({"budget": 173}, r"a budget of 173 samples: must lie between 1 and the \d+ whose captions hold an entry"),
    ],
)
def test_bad_requests_are_one_line(captioned, entries, options, message):
    with pytest.raises(UserError, match=message):
        make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, **options))


def test_another_request_under_the_same_name_is_refused(captioned, entries):
    make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=2))
    with pytest.raises(UserError, match="`per_entry` 2 → 3"):
        make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=3))
    entries.write_text("cat\n")
    with pytest.raises(UserError, match="matches"):
        make_balanced_plan(captioned, "p", PlanRequest("text-balance", entries=entries, per_entry=2))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 1e9), st.floats(0.5, 1e6)), min_size=1, max_size=20), st.floats(0.001, 0.999))
def test_the_root_of_an_increasing_function_is_found_in_few_steps(kinks, share):
    places, heights = np.array(kinks).T
    total, steps = heights.sum() + 2, []

    def excess(limit):
        steps.append(limit)
        return float((heights * np.minimum(1, limit / places)).sum() + 2 * min(1, limit / places.max())) - share * total

    root = solve_increasing(excess, places.max(), (1 - share) * total, -share * total)
    assert abs(excess(root)) <= 0.5
    assert len(steps) < 80
