"""Training counts: files in all forms, and names in captions against a plain search."""

import json
import re

import numpy as np
import pytest

from tailwise.errors import UserError
from tailwise.evaluate.counts import count_in_pool, read_train_counts
from tailwise.steps.importing.pool import import_pool

NAMES = ("tabby", "reel", "crane, bird")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.tsv", "class_index\twnid\tname\ttrain_count\n2\tn1\tcrane, bird\t0\n0\tn2\ttabby\t7\n1\tn3\treel\t12\n"),
        ("a.csv", 'class,count\ntabby,7\nreel,12\n"crane, bird",0\nunknown,99\n'),
        ("b.csv", 'name,x,train_count\r\nreel,1,12\r\ntabby,1,7\r\n"crane, bird",1,0\r\n'),
        ("a.json", json.dumps({"tabby": 7, "reel": 12.0, "crane, bird": 0, "unknown": 5})),
        ("b.json", "[7, 12, 0]"),
    ],
)
def test_all_forms_say_the_same(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert read_train_counts(tmp_path / file, NAMES).tolist() == [7, 12, 0]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a.csv", "name,count\ntabby,7\n", "no count for 2 of 3 classes, such as 'reel'"),
        ("a.csv", "name,count\ntabby,7\nreel,1\nreel,2\n", "counts 'reel' twice"),
        ("a.csv", "name,count\ntabby,-7\n", "whole number"),
        ("a.csv", "name,count\ntabby,many\n", "whole number"),
        ("a.csv", "name\ntabby\n", "give class_index or name or class, and train_count or count"),
        ("a.csv", "class_index,count\n3,7\n", "counts class 3: the set has classes 0 … 2"),
        ("a.csv", "class_index,count\nthree,7\n", "can't be read"),
        ("a.json", "[7, 12]", "no count for 1 of 3"),
        ("a.json", "[7, 12, 1.5]", "1.5: must be a whole number"),
        ("a.json", "[7, ", "can't be read"),
        ("a.json", "3", "neither"),
    ],
)
def test_mistakes_are_named(tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        read_train_counts(tmp_path / file, NAMES)


def test_classes_of_one_name_share_its_count(tmp_path):
    (tmp_path / "a.json").write_text('{"crane": 4, "reel": 1}')
    assert read_train_counts(tmp_path / "a.json", ("crane", "reel", "crane")).tolist() == [4, 1, 4]


def test_names_that_differ_in_case_and_punctuation_alone(tmp_path):
    classes = ("Basset Hound", "car_side", "St. Bernard", "crane")
    counts = {"basset_hound": 5, "car side": 6, "st bernard": 0, "crane": 2, "Crane": 9}
    (tmp_path / "a.json").write_text(json.dumps(counts))
    assert read_train_counts(tmp_path / "a.json", classes).tolist() == [5, 6, 0, 2]
    (tmp_path / "a.json").write_text(json.dumps({**counts, "ST-BERNARD": 3}))
    message = (
        "no count for 1 of 4 classes, such as 'St. Bernard' (it names no class by 'st bernard', 'Crane', 'ST-BERNARD')"
    )
    with pytest.raises(UserError, match=re.escape(message)):  # which of two is meant is not known
        read_train_counts(tmp_path / "a.json", classes)


def plain_count(captions, classes):
    """By a search for each name between characters that end a word."""
    spaced = [" " + re.sub(r"([,.;:?!`])", r" \1 ", caption.lower()) + " " for caption in captions]
    counts = []
    for name in classes:
        synonyms = [
            " " + re.sub(r"([,.;:?!`])", r" \1 ", s.lower()).strip() + " " for s in name.split(",") if s.strip()
        ]
        counts.append(sum(any(synonym in caption for synonym in synonyms) for caption in spaced))
    return counts


def test_names_are_found_as_words_in_any_case(tmp_path, make_tar, make_image):
    classes = ("tabby, Tabby Cat", "crane", "St. Bernard, Saint Bernard", "cat", "crane, bird", "teapot,")
    pieces = [
        "A TABBY CAT",
        "cranes",
        "crane.",
        "a st. bernard dog",
        "Saint Bernard!",
        "cat, bird",
        "scatter",
        "teapot",
    ]
    random = np.random.default_rng(0)
    captions = [" ".join(random.choice(pieces, 3)) for _ in range(120)]
    for shard in range(2):
        members = [
            member
            for row in range(shard, 120, 2)
            for member in ((f"{row:03d}.jpg", make_image()), (f"{row:03d}.txt", captions[row].encode()))
        ]
        make_tar(tmp_path / "pool" / f"{shard}.tar", members)
    import_pool([str(tmp_path / "pool")], tmp_path / "catalog", workers=1, part_rows=60)
    counts = count_in_pool(tmp_path / "catalog", classes, workers=1)
    assert counts.tolist() == plain_count(captions, classes)
    assert (counts > 0).all()
    assert counts[1] < counts[4]  # which "bird" names too


def test_no_catalog_is_said(tmp_path):
    with pytest.raises(UserError):
        count_in_pool(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", 'name,count,note\na,1,"tv 40\nb,2,x\n', "line 2 has a quote"),
        ("c.tsv", "name\tname\tcount\na\ta\t1\n", "2 columns called 'name'"),
        ("c.json", "[" * 100_000, "can't be read as training counts"),
        ("c.json", '{"a": 1e400, "b": 1}', "counts 'a' as inf"),
        ("c.json", '{"a": 1, "b": 9223372036854775808}', "counts 'b'"),
        ("c.json", '{"a": NaN, "b": 1}', "counts 'a' as nan"),
    ],
)
def test_hostile_counts_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_train_counts(tmp_path / name, ["a", "b"])


def test_quotes_in_tsv_swallow_no_class(tmp_path):
    (tmp_path / "c.tsv").write_text('name\tcount\tnote\na\t1\t"tv 40\nb\t2\t40" tv\n')
    assert read_train_counts(tmp_path / "c.tsv", ["a", "b"]).tolist() == [1, 2]
