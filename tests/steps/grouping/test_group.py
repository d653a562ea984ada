import csv
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailwise.catalog.artifacts import Artifact
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.drops import DROPPED_SCHEMA
from tailwise.catalog.files import note_digest
from tailwise.errors import UserError
from tailwise.requests import GroupRequest, PlanRequest
from tailwise.steps.drops import write_drops
from tailwise.steps.grouping import write as group_write
from tailwise.steps.grouping.group import _distinct, group
from tailwise.steps.grouping.write import write_grouping
from tailwise.steps.planning.plan import make_plan

KEYS = [f"{row:06d}" for row in range(600)]


def labels_of(catalog, name, column="label"):
    return np.concatenate(list(Clustering.open(catalog, name).parts(column)))


def add_column(catalog, values):
    """Gives the samples a column "mine", as a sidecar does for scores."""
    start = 0
    for part in catalog.parts():
        table = catalog.samples(part).append_column("mine", pa.array(values[start : start + part.rows]))
        pq.write_table(table, catalog.samples_path(part.number))
        note_digest(catalog.samples_path(part.number))
        start += part.rows


def drop(catalog, rows):
    config, inputs = {"snapshot": 1, "without": []}, {"snapshot": catalog.snapshot().id}
    with Artifact(catalog.drops_folder("some"), "filter", config, inputs) as artifact:
        write_drops(
            artifact,
            catalog.parts(),
            [pa.Table.from_pylist([{"row": row, "reason": "t"} for row in rows], DROPPED_SCHEMA)],
        )
        artifact.finish({})


def check(catalog, name, values, ordered):
    """Whether a grouping is the one of these values (None: no group), by plain Python."""
    numbers = {value: number for number, value in enumerate(ordered)}
    expected = [-1 if value is None else numbers[value] for value in values]
    assert labels_of(catalog, name).tolist() == expected
    seen = dict.fromkeys(expected, 0)
    for label, rank in zip(expected, labels_of(catalog, name, "rank").tolist(), strict=True):
        assert rank == (seen[label] if label >= 0 else 0)
        seen[label] += 1
    table = pq.read_table(catalog.clusters_folder(name) / "clusters.parquet").to_pydict()
    assert table["cluster"] == list(range(len(ordered)))
    assert table["value"] == [None if value is None else str(value) for value in ordered]
    assert table["size"] == [expected.count(number) for number in range(len(ordered))]
    assert table["d_intra"] == table["d_inter"] == [None] * len(ordered)


@pytest.mark.parametrize(
    ("values", "ordered"),
    [
        (["b", "a", "Ä", "10", "9", None], ["10", "9", "a", "b", "Ä"]),
        (["10", "9", "-3", "0", None], ["-3", "0", "9", "10"]),
        (["10", "09", "9"], ["09", "10", "9"]),
        ([10, 9, -3, None], [-3, 9, 10]),
        ([10.0, 9.0, float("nan"), None], [9, 10]),
        ([True, False, None], ["false", "true"]),
        (["", "x"], ["", "x"]),
    ],
)
def test_groups_are_the_distinct_values_in_order(small_catalog, values, ordered):
    pool = np.random.default_rng(3).integers(0, len(values), 600)
    chosen = [values[at] for at in pool]
    if isinstance(values[0], float):
        add_column(small_catalog, chosen)
        chosen = [None if value is None or np.isnan(value) else int(value) for value in chosen]
    else:
        add_column(small_catalog, chosen)
        chosen = [str(value).lower() if isinstance(value, bool) else value for value in chosen]
    made = group(small_catalog, GroupRequest("mine"))
    assert made.summary["clusters"] == len(ordered)
    assert made.summary["without_value"] == chosen.count(None)
    assert made.summary["samples"] == 600 - chosen.count(None)
    check(small_catalog, "mine", chosen, ordered)


def test_dictionaries_and_parts_without_the_column(small_catalog):
    first, second = small_catalog.parts()
    values = ["red", "blue"] * 230
    table = small_catalog.samples(first).append_column("mine", pa.array(values).dictionary_encode())
    pq.write_table(table, small_catalog.samples_path(0))
    note_digest(small_catalog.samples_path(0))
    group(small_catalog, GroupRequest("mine"))
    check(small_catalog, "mine", values + [None] * second.rows, ["blue", "red"])


def test_shards_and_extensions_are_columns_too(small_catalog):
    group(small_catalog, GroupRequest("shard"))
    check(small_catalog, "shard", [0] * 260 + [1] * 200 + [2] * 140, [0, 1, 2])
    group(small_catalog, GroupRequest("image_extension", name="kind"))
    check(small_catalog, "kind", ["jpg"] * 600, ["jpg"])


def write_file(path, identifiers, values, identifier="key"):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({identifier: identifiers, "language": values}), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(["other", identifier, "language"])
            writer.writerows(
                ("x", key, "" if value is None else value) for key, value in zip(identifiers, values, strict=True)
            )
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".tsv", ".csv"])
@pytest.mark.parametrize("identifier", ["key", "uid", "image_path"])
def test_files_are_joined_by_any_identifier(small_catalog, tmp_path, suffix, identifier):
    random = np.random.default_rng(1)
    values = [["de", "NA", "a,b", "7", None][at] for at in random.integers(0, 5, 600)]
    names = KEYS
    if identifier == "uid":
        names = [uid.hex() for part in small_catalog.parts() for uid in small_catalog.samples(part)["uid"].to_pylist()]
    order = random.permutation(600)[:590]
    unnamed = set(range(600)) - set(order.tolist())
    file = write_file(
        tmp_path / f"f{suffix}",
        [*(names[row] for row in order), "stranger", "another"],
        [*(values[row] for row in order), "de", "nobody's"],
        identifier,
    )
    made = group(small_catalog, GroupRequest("language", file=file))
    assert made.summary["values_without_sample"] == 2
    expected = [None if row in unnamed else value for row, value in enumerate(values)]
    check(small_catalog, "language", expected, ["7", "NA", "a,b", "de"])
    assert {path.suffix for path in small_catalog.clusters_folder("language").iterdir()} == {
        ".npy",
        ".parquet",
        ".json",
    }


def test_files_are_joined_by_the_identifier_that_fits_best(small_catalog, tmp_path):
    """The uids are those of another copy of the pool, but for two."""
    uids = [f"{row:032x}" for row in range(598)]
    uids += [row.hex() for part in small_catalog.parts() for row in small_catalog.samples(part)["uid"].to_pylist()][-2:]
    values = [f"v{row % 3}" for row in range(600)]
    path = tmp_path / "f.csv"
    path.write_text("\n".join(["uid,key,language", *map(",".join, zip(uids, KEYS, values, strict=True))]))
    made = group(small_catalog, GroupRequest("language", file=path))
    assert made.summary["values_without_sample"] == 0
    check(small_catalog, "language", values, ["v0", "v1", "v2"])


def test_whole_numbers_of_files_are_ordered_as_numbers(small_catalog, tmp_path):
    values = [f"{row % 12}" for row in range(600)]
    for suffix in (".tsv", ".parquet"):
        name = suffix[1:]
        group(
            small_catalog, GroupRequest("language", file=write_file(tmp_path / f"f{suffix}", KEYS, values), name=name)
        )
        assert labels_of(small_catalog, name).tolist() == [row % 12 for row in range(600)]


def test_samples_without_a_value_can_be_a_group(small_catalog):
    values = [None if row % 3 == 0 else "x" for row in range(600)]
    add_column(small_catalog, values)
    drop(small_catalog, range(50))
    made = group(small_catalog, GroupRequest("mine", missing="own-group", without=["some"]))
    assert labels_of(small_catalog, "mine")[:50].tolist() == [-1] * 50
    assert labels_of(small_catalog, "mine")[50:].tolist() == [1 if value is None else 0 for value in values[50:]]
    assert made.table["value"].to_pylist() == ["x", None]
    assert made.summary["without_value"] == 0
    assert made.summary["dropped"] == 50


@pytest.mark.parametrize("outside", [False, True])
def test_what_was_dropped_is_in_no_group_and_makes_none(small_catalog, tmp_path, outside):
    values = ["only here" if row < 5 else f"v{row % 2}" for row in range(600)]
    drop(small_catalog, [*range(5), 599])
    if outside:
        file = write_file(tmp_path / "f.parquet", KEYS, values)
        made = group(small_catalog, GroupRequest("language", file=file, name="mine", without=["some"]))
    else:
        add_column(small_catalog, values)
        made = group(small_catalog, GroupRequest("mine", without=["some"]))
    check(small_catalog, "mine", [None] * 5 + values[5:599] + [None], ["v0", "v1"])
    assert made.summary["dropped"] == 6
    assert made.summary["without_value"] == 0
    plan = make_plan(small_catalog, "p", PlanRequest("flat", budget=594, clustering="mine"))
    assert np.flatnonzero(plan.draw(0) == 0).tolist() == [*range(5), 599]


def test_plans_are_made_over_groups(small_catalog, small_groups):
    add_column(small_catalog, small_groups.tolist())
    group(small_catalog, GroupRequest("mine", name="truth"))
    plan = make_plan(small_catalog, "p", PlanRequest("dynamics", budget=200, clustering="truth"))
    drawn = np.bincount(small_groups, plan.draw(0), 12)
    assert drawn.sum() == 200
    assert drawn.tolist() == plan.counts(0).tolist()
    assert drawn[11] > 200 * 17 / 600 > 0


@settings(deadline=None)
@given(st.lists(st.integers(-30, 30) | st.integers(), min_size=1), st.integers(1, 5))
def test_written_numbers_are_ordered_as_numbers_in_any_split(numbers, pieces):
    arrays = [pa.array([str(number) for number in numbers[at::pieces]], pa.large_string()) for at in range(pieces)]
    distinct = _distinct(arrays, "c").to_pylist()
    fits = all(-(2**63) <= number < 2**63 for number in numbers)
    assert distinct == [str(number) for number in sorted(set(numbers))] if fits else sorted(map(str, set(numbers)))


def test_a_rerun_does_nothing_and_another_request_is_refused(small_catalog, tmp_path, tree_bytes):
    file = write_file(tmp_path / "f.tsv", KEYS, ["x"] * 600)
    group(small_catalog, GroupRequest("language", file=file))
    before = tree_bytes(small_catalog.folder)
    group(small_catalog, GroupRequest("language", file=file))
    assert tree_bytes(small_catalog.folder) == before
    with pytest.raises(UserError, match="`missing` leave-out → own-group"):
        group(small_catalog, GroupRequest("language", file=file, missing="own-group"))
    write_file(file, KEYS, ["y"] * 600)
    with pytest.raises(UserError, match="file "):
        group(small_catalog, GroupRequest("language", file=file))


def test_bad_requests_are_one_line(small_catalog, tmp_path, monkeypatch):
    add_column(small_catalog, [0.5] * 600)
    (tmp_path / "f.json").write_text("{}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    ragged = tmp_path / "ragged.tsv"
    ragged.write_text("key\tlanguage\na\tb\tc\n")
    lists = tmp_path / "lists.parquet"
    pq.write_table(pa.table({"key": ["a"], "language": [[1]]}), lists)
    twice = write_file(tmp_path / "twice.tsv", [*KEYS, KEYS[7]], ["x"] * 601)
    other = write_file(tmp_path / "other.csv", ["a"], ["x"], identifier="name")
    nobody = write_file(tmp_path / "nobody.csv", ["a"], ["x"])
    for column, options, message in (
        ("key", {}, "`by` key: it identifies samples"),
        ("image_offset", {}, "it identifies samples"),
        ("nope", {}, "no samples have a column 'nope': use one of height, image_extension, mine, shard, source, width"),
        ("width", {}, "not one sample has a value in 'width'"),
        ("mine", {}, "`by` mine: groups are text, whole numbers or booleans"),
        ("shard", {"missing": "x"}, "`missing` 'x': use leave-out or own-group"),
        ("shard", {"name": "a/b"}, "can't name an artifact"),
        ("shard", {"without": ["nope"]}, "no drop list named 'nope'"),
        ("language", {"file": tmp_path / "absent.tsv"}, "is no file"),
        ("language", {"file": tmp_path / "f.json"}, "groups are read from .parquet, .tsv, .csv"),
        ("language", {"file": tmp_path / "broken.parquet"}, "can't be read"),
        ("language", {"file": ragged}, "can't be read"),
        ("language", {"file": lists}, "groups are text, whole numbers or booleans, not list"),
        (
            "language",
            {"file": other},
            "needs the column 'language' and one of uid, key, image_path, sha256, md5, url; it has other, name",
        ),
        ("language", {"file": twice}, "the value of language of '000007' is given twice"),
        ("language", {"file": nobody}, r"1 of 1 rows \(100.0%\) belong to no sample"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            group(small_catalog, GroupRequest(column, **options))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(group_write, "MAX_GROUPS", 2)
    with pytest.raises(UserError, match="'shard' has more than 2 different values: give a coarser column"):
        group(small_catalog, GroupRequest("shard"))


def test_write_grouping_for_labels_made_elsewhere(small_catalog, tree_bytes):
    labels = [np.arange(part.rows, dtype=np.int32) % 4 - 1 for part in small_catalog.parts()]
    drop(small_catalog, [3])
    config = {"from": "theirs", "snapshot": 1, "without": ["some"]}
    made = write_grouping(small_catalog, "theirs", config, {"file": "hash"}, iter(labels), ["a", "b", "c", "empty"])
    values = [[None, "a", "b", "c"][label + 1] for label in itertools.chain(*labels)]
    values[3] = None
    check(small_catalog, "theirs", values, ["a", "b", "c", "empty"])
    assert made.summary["empty"] == 1
    identity = json.loads((small_catalog.clusters_folder("theirs") / "manifest.json").read_text())["identity"]
    assert identity["kind"] == "clusters"
    assert set(identity["inputs"]) == {"snapshot", "file", "without some"}

    def unread():
        raise AssertionError("a finished grouping reads no labels")
        yield

    again = write_grouping(small_catalog, "theirs", config, {"file": "hash"}, unread(), ["a", "b", "c", "empty"])
    assert again.summary == made.summary


def test_the_command_prints_its_figures(small_catalog, tmp_path):
    from tailwise.cli import app

    file = write_file(tmp_path / "f.tsv", [*KEYS[10:], "stranger"], ["x", "y"] * 295 + ["x"])
    drop(small_catalog, [20])
    folder = str(small_catalog.folder)
    options = ["--by", "language", "--file", str(file), "--without", "some"]
    printed = CliRunner().invoke(app, ["group", folder, *options]).output
    assert "grouping 'language': 2 groups of 589 samples" in printed
    assert "1 samples are left out (some, removed ones)" in printed
    assert "10 samples have no value" in printed
    assert "1 values belong to no sample" in printed
    told = json.loads(CliRunner().invoke(app, ["group", folder, *options, "--json"]).output)
    assert told == {
        "name": "language",
        "clusters": 2,
        "empty": 0,
        "samples": 589,
        "dropped": 1,
        "without_value": 10,
        "values_without_sample": 1,
        "unused_drop_lists": [],
    }


def test_labels_that_dont_fit_are_refused(small_catalog):
    config = {"snapshot": 1, "without": []}
    for labels, error in (
        ([np.zeros(460, np.int32), np.zeros(139, np.int32)], "139 labels"),
        ([np.zeros(460, np.int32), np.full(140, 1, np.int32)], "labels up to 1"),
        ([np.zeros(460, np.int32)], "shorter"),
    ):
        with pytest.raises(ValueError, match=error):
            write_grouping(small_catalog, "x", config, {}, labels, ["a"])


@pytest.mark.shared_data
def test_the_classes_of_real_photographs(shared_data, tmp_path):
    from tailwise.steps.importing.pool import import_pool

    source = shared_data / "tinyimagenet-lt"
    catalog = import_pool([str(source / "train")], tmp_path / "catalog", workers=1).catalog
    made = group(catalog, GroupRequest("wnid", file=source / "truth.tsv"))
    with (source / "truth.tsv").open() as stream:
        truth = {row["key"]: row["wnid"] for row in csv.DictReader(stream, delimiter="\t")}
    keys = [key for part in catalog.parts() for key in catalog.samples(part, ["key"])["key"].to_pylist()]
    classes = made.table["value"].to_pylist()
    assert len(classes) == 200
    assert [classes[label] for label in labels_of(catalog, "wnid")] == [truth[key] for key in keys]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_values_of_any_type_and_quotes(small_catalog, tmp_path, suffix):
    path = tmp_path / f"g{suffix}"
    values = ["en", '"de', 'fr"']
    if suffix == ".parquet":
        columns = {"key": pa.array(KEYS[:3], pa.string_view()), "language": pa.array(values).dictionary_encode()}
        pq.write_table(pa.table(columns), path)
    else:
        lines = zip(KEYS, values if suffix == ".tsv" else ["en", '"""de"', 'fr"'], strict=False)
        mark = "\t" if suffix == ".tsv" else ","
        path.write_text("\n".join([f"key{mark}language", *(mark.join(line) for line in lines)]))
    made = group(small_catalog, GroupRequest("language", file=path))
    assert sorted(made.table.column("value").to_pylist()) == sorted(values)


def test_two_columns_of_one_name_are_refused(small_catalog, tmp_path):
    table = pa.Table.from_arrays([pa.array(KEYS), pa.array(KEYS), pa.array(KEYS)], ["key", "key", "language"])
    pq.write_table(table, tmp_path / "g.parquet")
    with pytest.raises(UserError, match="2 columns called 'key'"):
        group(small_catalog, GroupRequest("language", file=tmp_path / "g.parquet"))


def test_a_grouping_is_finished_when_its_work_is_gone(small_catalog, tmp_path, monkeypatch):
    """A process that is killed behind its manifest leaves nothing that no command would remove."""
    there = []
    finish = Artifact.finish
    monkeypatch.setattr(
        Artifact, "finish", lambda self, summary: there.extend(self.folder.iterdir()) or finish(self, summary)
    )
    group(small_catalog, GroupRequest("language", file=write_file(tmp_path / "g.tsv", KEYS, ["a", "b"] * 300)))
    assert not any(path.is_dir() for path in there)


def test_a_file_of_another_pool_is_refused(small_catalog, tmp_path):
    half = [key if at % 2 else f"x{key}" for at, key in enumerate(KEYS)]  # more rows than the pool, and fewer samples
    path = write_file(tmp_path / "g.tsv", half, ["a"] * len(half))
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"300 of 600 rows \(50\.0%\) belong to no sample, such as 'x000000', and 300 of 600 samples",
        ):
            group(small_catalog, GroupRequest("language", file=path))
    assert group(small_catalog, GroupRequest("language", file=path, max_rejected=0.5)).summary["samples"] == 300
    more = write_file(tmp_path / "more.tsv", [*KEYS, *(f"x{key}" for key in KEYS)], ["a"] * 1200)
    assert group(small_catalog, GroupRequest("language", file=more, name="more")).summary["samples"] == 600
    fewer = write_file(tmp_path / "fewer.tsv", KEYS[:10], ["a"] * 10)
    assert group(small_catalog, GroupRequest("language", file=fewer, name="fewer")).summary["samples"] == 10
