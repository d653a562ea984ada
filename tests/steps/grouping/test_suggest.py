"""Lists of entries that captions suggest."""

import json
import re
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from tailwise.catalog.drops import Survivors
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.kernels.matching import number_forms
from tailwise.requests import GroupRequest
from tailwise.steps.grouping.group import group
from tailwise.steps.grouping.match import MatchedPool, match_entries
from tailwise.steps.grouping.suggest import COLLOCATION, suggest_entries
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.upkeep.remove import remove

CAPTIONS = [
    *["Nike Men Black Flip Flops", "Puma Women Blue Shirt", "Puma Men Black Shirts", "a flip flop on sand"] * 3,
    *["Blue shirt, red watch", "watches of Nike", "Red flip flops 2019", "Shirts and shirt", "Black"],
    *[f"{colour} {thing}" for colour in ("red", "blue", "Black") for thing in ("Watch", "shirt")],
]


@pytest.fixture
def titled(tmp_path, make_tar, make_image):
    """`titled(part_rows)` → a catalog of 23 samples with these captions."""
    image = make_image()
    for shard, start in enumerate(range(0, len(CAPTIONS), 4)):
        rows = enumerate(CAPTIONS[start : start + 4], start)
        members = [
            each for row, text in rows for each in ((f"{row:05d}.jpg", image), (f"{row:05d}.txt", text.encode()))
        ]
        make_tar(tmp_path / "titles" / f"{shard:05d}.tar", members)
    return lambda rows: (
        import_pool([str(tmp_path / "titles")], tmp_path / f"c{rows}", workers=1, part_rows=rows).catalog
    )


def plain(captions, stop, *, ignore_case=False):
    """The rule in plain Python: (term, captions that hold it, captions with a phrase that ends with it), most ends first."""
    counts, ends = Counter(), Counter()
    for caption in captions:
        phrases = re.split(rf"\b(?:{stop})\b|[,0-9]+", caption.lower() if ignore_case else caption)
        words = [phrase.split() for phrase in phrases]
        pairs = [list(map(" ".join, pairwise(each))) for each in words]
        counts.update({term for each in (*words, *pairs) for term in each})
        ends.update({term for each in (*words, *pairs) for term in each[-1:]})
    found = []
    for term in sorted(ends, key=lambda term: (-ends[term], term)):
        one, *other = (counts[word] for word in term.split())
        if not other or counts[term] * len(captions) >= COLLOCATION * one * other[0]:
            found.append((term, counts[term], ends[term]))
    return found


@pytest.mark.parametrize("ignore_case", [False, True])
def test_terms_are_those_of_the_plain_rule_whatever_the_parts(titled, ignore_case):
    expected = plain(CAPTIONS, "a|on|of|and", ignore_case=ignore_case)
    request = GroupRequest(suggest=True, ignore_case=ignore_case, workers=1)
    for rows in (5, 100):
        found = suggest_entries(titled(rows), request)
        assert [tuple(asdict(item).values()) for item in found.entries] == expected
        assert (found.captions, found.least) == (len(CAPTIONS), 0)
    some = 0
    for most in (18, 25, 35):  # less memory: fewer terms, and their counts are exact
        found = suggest_entries(titled(5), request, most=most)
        assert found.least > 0
        some += len(found.entries)
        assert [tuple(asdict(item).values()) for item in found.entries] == [
            item for item in expected if item[2] > found.least
        ]
    assert some


def test_plurals_are_one_term_and_counts_are_those_of_the_list(titled, tmp_path):
    catalog = titled(5)
    request = GroupRequest(
        suggest=True, ignore_case=True, plurals=True, terms=7, output=tmp_path / "list.txt", workers=1
    )
    found = suggest_entries(catalog, request)
    names = [item.entry for item in found.entries]
    assert len(names) == 7
    assert {"shirt", "flip flops", "watch"} <= set(names)
    assert not any(form in names for name in names for form in number_forms(name))
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert lines == [f"{item.entry}\t{item.captions}\t{item.ends}" for item in found.entries]
    matches = match_entries(catalog, tmp_path / "list.txt", ignore_case=True, plurals=True, workers=1)
    snapshot = catalog.snapshot()
    counts, _ = MatchedPool(catalog, snapshot, Survivors(catalog, [], snapshot), matches).count()
    assert counts.tolist() == [item.captions for item in found.entries]
    assert counts[names.index("watch")] == 5  # "watches" too
    made = group(catalog, GroupRequest(entries=tmp_path / "list.txt", ignore_case=True, plurals=True, workers=1))
    assert set(made.table.column("value").to_pylist()) <= set(names)


def test_captions_without_words_suggest_nothing(captioned):
    remove_all = "\n".join(f"{row:05d}" for row in range(173))
    (captioned.folder.parent / "gone.txt").write_text(remove_all)
    remove(captioned, captioned.folder.parent / "gone.txt")
    with pytest.raises(UserError, match="no term ends a phrase in more than 0 of 0 captions"):
        suggest_entries(captioned, GroupRequest(suggest=True, workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suggest": True, "by": "shard"}, "`by` does nothing with `suggest`"),
        ({"by": "shard", "terms": 3}, "`terms` does nothing without `suggest`"),
        ({"suggest": True, "terms": 0}, "`terms` 0: must be at least 1"),
        ({"by": "shard", "plurals": True}, "`plurals` does nothing without `entries`"),
    ],
)
def test_requests_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GroupRequest(**options)


def test_removed_samples_are_not_counted_and_a_list_is_not_replaced(titled, tmp_path):
    catalog = titled(100)
    (tmp_path / "gone.txt").write_text("\n".join(f"{row:05d}" for row in range(12)))
    remove(catalog, tmp_path / "gone.txt")
    folder, output = str(catalog.folder), tmp_path / "list.txt"
    told = CliRunner().invoke(app, ["group", folder, "--suggest", "--json", "--output", str(output)])
    found = json.loads(told.stdout)
    expected = plain(CAPTIONS[12:], "a|on|of|and")
    assert [tuple(item.values()) for item in found["entries"]] == expected
    printed = CliRunner().invoke(app, ["group", folder, "--suggest", "--ignore-case", "--terms", "3"]).output
    assert "shirt" in printed
    output.write_text("shirt\n")
    again = CliRunner().invoke(app, ["group", folder, "--suggest", "--output", str(output)])
    assert "list.txt exists" in str(again.exception)
    assert output.read_text() == "shirt\n"
    CliRunner().invoke(app, ["filter", folder, "--by", "caption-words", "--min", "1"])
    words = ["--without", "caption-words"]
    told = (
        CliRunner().invoke(app, ["group", folder, "--suggest", "--output", str(output), "--overwrite", *words]).output
    )
    assert told.endswith(f"then `tailwise group {folder} {' '.join(words)} --entries {output}`\n")
    assert output.read_text().startswith(f"{expected[0][0]}\t{expected[0][1]}\t")
