import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import read_table
from tailwise.cli import app
from tailwise.errors import UserError
from tailwise.requests import GroupRequest, PlanRequest
from tailwise.steps.drops import write_drops
from tailwise.steps.grouping.group import group
from tailwise.steps.planning.plan import make_plan


def groups_of(catalog, name):
    """The entry that each row is grouped by, or None."""
    values = catalog_table(catalog, name)["value"]
    labels = np.concatenate(list(Clustering.open(catalog, name).parts("label")))
    return [values[label] if label >= 0 else None for label in labels.tolist()]


def catalog_table(catalog, name):
    return read_table(catalog.clusters_folder(name) / "clusters.parquet").to_pydict()


@pytest.fixture(scope="session")
def rarest(matched):
    """The rarest entry of each caption, in plain Python; None without one."""

    def find(captions):
        found = [matched(caption) for caption in captions]
        counts = Counter(entry for each in found for entry in each)
        return [min(each, key=lambda entry: counts[entry], default=None) for each in found]

    return find


def test_groups_are_the_rarest_entries_in_the_order_of_the_list(captioned, captions, entries, listed, rarest):
    made = group(captioned, GroupRequest(entries=entries, workers=1))
    expected = rarest(captions)
    assert groups_of(captioned, "entries") == expected
    table = catalog_table(captioned, "entries")
    assert table["value"] == sorted(set(expected) - {None}, key=listed.index)
    assert table["size"] == [expected.count(value) for value in table["value"]]
    assert made.summary["without_value"] == expected.count(None) >= 2
    assert made.summary["entries_without_group"] == 10 - len(table["value"]) >= 2


def test_of_equally_rare_entries_the_first_of_the_list(captioned, captions, matched, tmp_path):
    for order in (["cat", "zebra", "dog"], ["dog", "zebra", "cat"]):
        (tmp_path / "two.txt").write_text("\n".join(order))
        with_both = [row for row, caption in enumerate(captions) if {"cat", "dog"} <= set(matched(caption))]
        name = order[0]
        group(
            captioned,
            GroupRequest(entries=tmp_path / "two.txt", name=name, without=[drop_all_but(captioned, with_both, name)]),
        )
        assert [groups_of(captioned, name)[row] for row in with_both] == [order[0]] * len(with_both)


def drop_all_but(catalog, kept, name):
    snapshot = catalog.snapshot()
    config = {"snapshot": 1, "without": []}
    with Artifact(catalog.drops_folder(name), "filter", config, {"snapshot": snapshot.id}) as artifact:
        rows = [{"row": row, "reason": "test"} for row in range(snapshot.rows) if row not in set(kept)]
        write_drops(artifact, catalog.parts(), [pa.Table.from_pylist(rows, DROPPED_SCHEMA)])
        artifact.finish({})
    return name


def test_what_was_dropped_is_not_counted(captioned, captions, entries, rarest):
    kept = [row for row in range(len(captions)) if row % 3]
    group(captioned, GroupRequest(entries=entries, without=[drop_all_but(captioned, kept, "third")], workers=1))
    expected = rarest([captions[row] for row in kept])
    assert expected != [rarest(captions)[row] for row in kept]  # the list does change what is rare
    found = groups_of(captioned, "entries")
    assert [found[row] for row in kept] == expected
    assert not any(found[::3])


def test_captions_without_an_entry_can_be_a_group(captioned, captions, entries, rarest):
    group(captioned, GroupRequest(entries=entries, missing="own-group", workers=1))
    assert groups_of(captioned, "entries") == rarest(captions)  # the last group's value is null
    table = catalog_table(captioned, "entries")
    assert (table["value"][-1], table["size"][-1]) == (None, rarest(captions).count(None))


def test_plans_are_made_over_them_and_a_rerun_does_nothing(captioned, entries, tree_bytes):
    group(captioned, GroupRequest(entries=entries, workers=1))
    before = tree_bytes(captioned.clusters_folder("entries"))
    plan = make_plan(captioned, "p", PlanRequest("dynamics", budget=40, clustering="entries"))
    drawn = plan.draw(0)
    assert drawn.sum() == 40
    assert all(
        group is not None for group, copies in zip(groups_of(captioned, "entries"), drawn, strict=True) if copies
    )
    shutil.rmtree(captioned.folder / "matches")
    group(captioned, GroupRequest(entries=entries, workers=2))
    assert tree_bytes(captioned.clusters_folder("entries")) == before
    entries.write_text("cat\n")
    with pytest.raises(UserError, match="entries"):
        group(captioned, GroupRequest(entries=entries, workers=1))
    with pytest.raises(UserError, match="no drop list named 'nosuch'"):
        group(captioned, GroupRequest(entries=entries, name="other", without=["nosuch"], workers=1))
    assert not (captioned.folder / "matches").exists()  # nothing was matched in vain


def test_the_command(captioned, captions, entries, rarest):
    folder = str(captioned.folder)
    printed = CliRunner().invoke(app, ["group", folder, "--entries", str(entries), "--name", "words"]).output
    groups = rarest(captions)
    assert f"grouping 'words': {len(set(groups)) - 1} groups of {len(groups) - groups.count(None)} samples" in printed
    assert f"{groups.count(None)} samples have no entry in their captions and belong to no group" in printed
    assert "entries of the list are the rarest of no caption" in printed
    told = CliRunner().invoke(app, ["group", folder, "--entries", str(entries), "--ignore-case", "--json"]).output
    assert json.loads(told)["name"] == "entries"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --by COLUMN, --entries FILE and --concepts NAME"),
        (["--entries", "x.txt", "--by", "shard"], "give one of --by COLUMN, --entries FILE and --concepts NAME"),
        (["--by", "shard", "--ignore-case"], "--ignore-case does nothing without --entries"),
        (["--by", "shard", "--allow-misses"], "--allow-misses does nothing without --entries"),
        (
            ["--entries", "x.txt", "--allow-misses", "--max-misses", "0.1"],
            "--max-misses does nothing with --allow-misses",
        ),
        (["--entries", "x.txt", "--max-misses", "1.1"], "--max-misses 1.1: must lie between 0 and 1"),
        (["--entries", "x.txt", "--file", "y.tsv"], "--file does nothing with --entries"),
        (["--entries", "x.txt"], "x.txt can't be read as a list of entries"),
        (["--entries", "{strange}"], "173 of 173 samples have no entry of {strange} in their captions"),
        (["--entries", "{strange}", "--missing", "x"], "--missing 'x': use leave-out or own-group"),
    ],
)
def test_bad_requests_are_one_line(captioned, tmp_path, options, message):
    (tmp_path / "strange.txt").write_text("xylophone")
    given = [option.format(strange=tmp_path / "strange.txt") for option in options]
    result = CliRunner().invoke(app, ["group", str(captioned.folder), *given])
    assert isinstance(result.exception, UserError)
    assert message.format(strange=tmp_path / "strange.txt") in str(result.exception)


def test_a_list_in_another_case_is_refused_with_the_hits_of_both_ways(captioned, captions, entries, rarest, tmp_path):
    """As class names in lower case are, over captions in Title Case."""
    upper = tmp_path / "upper.txt"
    upper.write_text(entries.read_text().upper())
    hits = sum(map(bool, rarest([caption.lower() for caption in captions])))
    folder = str(captioned.folder)
    result = CliRunner().invoke(app, ["group", folder, "--entries", str(upper)])
    told = str(result.exception)
    assert isinstance(result.exception, UserError)
    assert f"of 173 samples have no entry of {upper}" in told
    assert "--ignore-case finds" in told
    assert not list((captioned.folder / "clusters").glob("*/manifest.json"))
    result = CliRunner().invoke(app, ["group", folder, "--entries", str(upper), "--allow-misses", "--json"])
    figures = json.loads(result.stdout)
    found = [caption for caption in captions if any(f" {entry} " in f" {caption} " for entry in ("ABSENT", "U.S."))]
    assert figures["matched_as_given"] == figures["samples"] == 173 - figures["unmatched"] >= len(found)
    assert figures["matched_ignoring_case"] >= hits > figures["matched_as_given"]
    assert set(figures["unmatched_captions"]) <= set(captions)
    assert set(figures["unmatched_words"]) <= set(" ".join(captions).split())
    group(captioned, GroupRequest(entries=upper, name="all", missing="own-group", workers=1))  # nothing is lost
    assert catalog_table(captioned, "all")["size"][-1] == figures["unmatched"]
