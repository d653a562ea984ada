"""Lists of concepts: from every source against plain Python, and what is made of them: groups, balanced plans, counts."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.concepts import Concepts
from tailwise.catalog.files import read_table
from tailwise.errors import UserError
from tailwise.evaluate.counts import count_concepts
from tailwise.plan import Plan
from tailwise.requests import ConceptsRequest, GroupRequest, PlanRequest
from tailwise.steps.grouping.concepts import make_concepts
from tailwise.steps.grouping.group import group
from tailwise.steps.importing.pool import import_pool
from tailwise.steps.planning.plan import make_plan
from tailwise.steps.upkeep.remove import remove

ROWS = 60
NAMES = ["zebra", "ant", "Ölkanne", "dog", "cat", "grass", "sky", "7"]


@pytest.fixture(scope="session")
def tags():
    """Tags of each row: unsorted, some twice, some rows without; rare and frequent ones."""
    generator = np.random.default_rng(4)
    shares = np.array([1, 2, 4, 20, 25, 30, 40, 3]) / 125
    return [generator.choice(NAMES, generator.integers(0, 5), p=shares).tolist() for _ in range(ROWS)]


@pytest.fixture
def tagged(tmp_path, make_tar, make_image, tags):
    """A pool of three parts, whose captions and JSON hold the tags."""
    for shard in range(4):
        members = []
        for row in range(shard * 15, shard * 15 + 15):
            caption = f"A {' and '.join(tags[row])} here"
            content = json.dumps({"found": {"tags": tags[row]}, "text": json.dumps(tags[row])})
            texts = {"jpg": make_image(row), "txt": caption.encode(), "json": content.encode()}
            members += [(f"{row:04d}.{suffix}", content) for suffix, content in texts.items()]
        make_tar(tmp_path / "pool" / f"{shard:05d}.tar", members)
    return import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=20).catalog


def lists_of(concepts):
    """The names of each row, by part and by rows in any order: the same."""
    rows, found = np.random.default_rng(0).permutation(concepts.snapshot.rows), []
    for part in concepts.catalog.parts(concepts.snapshot):
        counts, codes = concepts.part(part, np.ones(part.rows, bool))
        found += [each.tolist() for each in np.split(codes, np.cumsum(counts)[:-1])]
    counts, codes = concepts.of(rows)
    assert counts.dtype == codes.dtype == np.int32
    anyhow = np.split(codes, np.cumsum(counts)[:-1])
    assert [found[row] for row in rows] == [each.tolist() for each in anyhow]
    return [[concepts.entries[code] for code in each] for each in found]


def expected(tags):
    return [sorted(set(each)) for each in tags]


def write(folder, tags, form):
    keys = [f"{row:04d}" for row in range(len(tags))]
    order = np.random.default_rng(1).permutation(len(tags)).tolist()
    keys, tags = [keys[at] for at in order], [tags[at] for at in order]
    if form == "jsonl":
        path = folder / "tags.jsonl"
        path.write_text(
            "".join(json.dumps({"key": key, "tags": each}) + "\n" for key, each in zip(keys, tags, strict=True))
        )
    elif form == "tsv":
        path = folder / "tags.tsv"
        path.write_text(
            "key\ttags\n" + "".join(f"{key}\t{json.dumps(each)}\n" for key, each in zip(keys, tags, strict=True))
        )
    else:
        path = folder / "tags.parquet"
        kinds = {"list": pa.list_(pa.string()), "large list": pa.large_list(pa.large_string()), "json": pa.string()}
        values = [json.dumps(each) for each in tags] if form == "json" else tags
        pq.write_table(pa.table({"key": keys, "tags": pa.array(values, kinds[form])}), path)
    return path


@pytest.mark.parametrize("form", ["list", "large list", "json", "jsonl", "tsv"])
def test_lists_of_tables(tagged, tags, tmp_path, form):
    made = make_concepts(tagged, [write(tmp_path, tags, form)], ConceptsRequest(name="tags"))
    assert lists_of(made.concepts) == expected(tags)
    table = read_table(made.concepts.folder / "entries.parquet").to_pydict()
    counts = Counter(name for each in expected(tags) for name in each)
    assert table == {"concept": sorted(counts), "count": [counts[name] for name in sorted(counts)]}
    assert made.concepts.summary["with_concepts"] == sum(map(bool, tags))
    assert not (tmp_path / "catalog" / "concepts" / ".tags.unfinished").exists()


@pytest.mark.parametrize("field", ["found.tags", "text"])
def test_lists_of_json_in_tars(tagged, tags, field):
    made = make_concepts(tagged, [f"json:{field}"], ConceptsRequest(name="tags"))
    assert lists_of(made.concepts) == expected(tags)


def test_entries_of_captions_and_what_lists_agree_on(tagged, tags, tmp_path):
    (tmp_path / "entries.txt").write_text("dog\nzebra\nsky\nunheard\n")
    given = [[*each[1:], "elsewhere"] for each in tags]
    words = make_concepts(
        tagged, [], ConceptsRequest(name="words", entries=tmp_path / "entries.txt", workers=1)
    ).concepts
    assert lists_of(words) == [sorted({*each} & {"dog", "zebra", "sky"}) for each in tags]
    make_concepts(tagged, [write(tmp_path, given, "list")], ConceptsRequest(name="images"))
    agreed = make_concepts(tagged, [], ConceptsRequest(name="agreed", both=("words", "images"))).concepts
    wanted = [sorted({*each} & {"dog", "zebra", "sky"} & {*image}) for each, image in zip(tags, given, strict=True)]
    assert lists_of(agreed) == wanted
    assert agreed.entries == sorted({name for each in wanted for name in each})


def test_whole_numbers_case_blanks_and_nothing(tagged, tmp_path):
    lists = [[3, 12], ["Dog", " dog ", "", None], None, [], ["12"]] + [["x"]] * (ROWS - 5)
    path = tmp_path / "tags.jsonl"
    path.write_text(
        "".join(json.dumps({"key": f"{row:04d}", "tags": json.dumps(each)}) + "\n" for row, each in enumerate(lists))
    )
    made = make_concepts(tagged, [path], ConceptsRequest(name="n", ignore_case=True))
    assert lists_of(made.concepts)[:6] == [["12", "3"], ["dog"], [], [], ["12"], ["x"]]


def test_rows_without_sample_and_samples_without_row(tagged, tags, tmp_path):
    path = write(tmp_path, [["dog"]] * 40, "list")
    made = make_concepts(tagged, [path], ConceptsRequest(name="tags"))
    assert lists_of(made.concepts) == [["dog"]] * 40 + [[]] * 20
    table = pa.table({"key": ["0001", "0001", "nobody"], "tags": [["a"], ["b"], ["c"]]})
    pq.write_table(table, tmp_path / "few.parquet")
    with pytest.raises(UserError, match=r"59 of 60 samples have no concept: .* 0.9 is taken for right\), or accept it"):
        make_concepts(tagged, [tmp_path / "few.parquet"], ConceptsRequest(name="few"))
    few = make_concepts(tagged, [tmp_path / "few.parquet"], ConceptsRequest(name="few", max_misses=0.99))
    assert lists_of(few.concepts)[:3] == [[], ["a"], []]
    assert {reason for _, reason in few.rejections.counts} == {
        "duplicate list of concepts",
        "list of concepts without sample",
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("dog, cat", "column 'tags' of .*tags.parquet holds \"dog, cat\": give lists of texts or whole numbers"),
        ('{"a": 1}', 'holds {"a": 1}: give lists'),
        ("[1.5]", r"holds \[1.5\]: give lists"),
        ("[true]", "give lists"),
        ('[["a"]]', "give lists"),
        (r'["\ud800"]', "give lists"),
        ("3", "holds 3: give lists"),
    ],
)
def test_values_that_are_no_lists_are_named(tagged, tmp_path, value, words):
    pq.write_table(pa.table({"key": ["0001"], "tags": [value]}), tmp_path / "tags.parquet")
    with pytest.raises(UserError, match=words):
        make_concepts(tagged, [tmp_path / "tags.parquet"], ConceptsRequest(name="tags"))
    pq.write_table(pa.table({"key": ["0001"], "tags": [["a"]]}), tmp_path / "tags.parquet")
    make_concepts(tagged, [tmp_path / "tags.parquet"], ConceptsRequest(name="tags", max_misses=1))  # the name is free


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([[b"dog", b"\xc3\xa4"]]), None),
        (pa.array([[b"\xff"]]), "can't decode byte 0xff"),
        (pa.array([[1]], pa.list_(pa.timestamp("s"))), "a list holds 1970-01-01 00:00:01, which is neither a text"),
    ],
)
def test_lists_of_bytes_are_texts_and_other_types_are_named(tagged, tmp_path, values, words):
    pq.write_table(pa.table({"key": ["0001"], "tags": values}), tmp_path / "tags.parquet")
    request = ConceptsRequest(name="tags", max_misses=1)
    if words is None:
        assert make_concepts(tagged, [tmp_path / "tags.parquet"], request).concepts.entries == ["dog", "ä"]
    else:
        with pytest.raises(UserError, match=words):
            make_concepts(tagged, [tmp_path / "tags.parquet"], request)


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        ([], {}, "give one of a TABLE, json:FIELD, `entries` FILE, and `both` NAME twice"),
        (["json:text"], {"both": ("a", "b")}, "give one of a TABLE"),
        (["json:text", "json:found.tags"], {}, "give one field of the JSON"),
        (["json:text,json:found.tags"], {}, "give one field of the JSON"),
        (["json:found"], {}, "found of the samples' .json holds"),
        (["json:nothing"], {}, "60 of 60 samples have no concept: compare the source with the pool$"),
        ([], {"both": ("a", "b")}, "no concepts named 'a'"),
    ],
)
def test_impossible_requests_are_refused(tagged, sources, options, words):
    with pytest.raises(UserError, match=words):
        make_concepts(tagged, sources, ConceptsRequest(name="x", **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"both": ("a",)}, "name two lists of concepts or more"),
        ({"both": ("a", "b", "a")}, "each once"),
        ({"both": ("a", "b"), "column": "tags"}, "`column` does nothing with `both`"),
        ({"plurals": True}, "`plurals` does nothing without `entries`"),
    ],
)
def test_options_that_do_nothing_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ConceptsRequest(name="x", **options)


@pytest.fixture
def listed(tagged, tags, tmp_path):
    """The pool with lists "tags", of which two rows are removed afterwards; and what is left of each row."""
    make_concepts(tagged, [write(tmp_path, tags, "list")], ConceptsRequest(name="tags"))
    (tmp_path / "removed.txt").write_text("0003\n0040\n")
    remove(tagged, tmp_path / "removed.txt", reason="test")
    return tagged, [[] if row in (3, 40) else each for row, each in enumerate(expected(tags))]


def test_groups_are_the_rarest_concepts(listed):
    catalog, lists = listed
    counts = Counter(name for each in lists for name in each)
    wanted = [min(each, key=lambda name: (counts[name], name), default=None) for each in lists]
    made = group(catalog, GroupRequest(concepts="tags"))
    labels = np.concatenate(list(Clustering.open(catalog, "tags").parts("label"))).tolist()
    assert [made.values[label] if label >= 0 else None for label in labels] == wanted
    assert made.inputs["concepts tags"] == Concepts(catalog, "tags").id


def test_balanced_plans_thin_frequent_concepts(listed):
    catalog, lists = listed
    counts = Counter(name for each in lists for name in each)
    make_plan(catalog, "p", PlanRequest(concepts="tags", per_entry=5))
    rates = [1 - np.prod([1 - min(1, 5 / counts[name]) for name in each]) for each in lists]
    np.testing.assert_allclose(Plan(catalog, "p").rates[:], rates, rtol=1e-6)
    for options in ({"ignore_case": True}, {"entries": catalog.folder}):
        with pytest.raises(UserError, match=r"`ignore_case` does nothing with `concepts`|needs `entries`"):
            make_plan(catalog, "q", PlanRequest(concepts="tags", per_entry=5, **options))


def test_counts_of_classes(tagged, tags, tmp_path):
    make_concepts(tagged, [write(tmp_path, tags, "list")], ConceptsRequest(name="tags"))
    classes = ["Dog", "cat, zebra", "unheard", "ölkanne", "dog"]
    wanted = [
        sum(bool({*each} & names) for each in tags)
        for names in ({"dog"}, {"cat", "zebra"}, set(), {"Ölkanne"}, {"dog"})
    ]
    assert count_concepts(tagged.folder, "tags", classes).tolist() == wanted


def test_lists_of_an_older_snapshot_do_not_cover_new_samples(tagged, tags, tmp_path, make_tar, make_image):
    make_concepts(tagged, [write(tmp_path, tags, "list")], ConceptsRequest(name="tags"))
    make_tar(tmp_path / "pool" / "00009.tar", [("9999.jpg", make_image(9)), ("9999.txt", b"new")])
    catalog = import_pool([str(tmp_path / "pool")], tagged.folder, workers=1).catalog
    with pytest.raises(UserError, match="concepts 'tags' are of snapshot 1: 1 samples of snapshot 2 have none yet"):
        group(catalog, GroupRequest(concepts="tags"))


def test_commands(tagged, tags, tmp_path, run_tailwise):
    path = write(tmp_path, tags, "list")
    told = run_tailwise("concepts", tagged.folder, path, "--name", "tags").stdout
    assert f"concepts 'tags': {sum(map(bool, tags))} of 60 samples have some of the " in told
    shown = json.loads(run_tailwise("concepts", tagged.folder, path, "--name", "tags", "--json").stdout)
    assert shown["samples"] == ROWS
    assert (
        "concepts are thinned"
        not in run_tailwise("plan", tagged.folder, "p", "--concepts", "tags", "--keep", 0.3).stdout
    )
    assert "groups of" in run_tailwise("group", tagged.folder, "--concepts", "tags").stdout
    assert "tags" in run_tailwise("status", tagged.folder).stdout
    assert "plans/p" in run_tailwise("delete", tagged.folder, "concepts/tags", code=2).stderr
