import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.matching import (
    CAPTIONS_PER_CALL,
    EntryMatcher,
    keep_rates,
    number_forms,
    plural,
    rarest_entries,
    space_out,
)

PIECES = [
    "a",
    "b",
    "aa",
    "ab",
    "Ab",
    "é",
    "ß",
    "日本",
    "🐈",
    " ",
    "  ",
    ",",
    ".",
    "a.b",
    "!",
    "\t",
    "\n",
    "\r",
    "\u00a0",
    "\x00",
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=8)
spelled = st.lists(st.sampled_from(["a", "b", "aa", "ab", "é", "日本", ",", ".", "a.b"]), min_size=1, max_size=4)
entries_of = st.lists(spelled.map(" ".join) | st.text(min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


def plain(captions, entries, ignore_case=False):
    """MetaCLIP's rule in plain Python: the entries in each caption."""
    found = []
    for caption in captions:
        text = f" {caption.lower() if ignore_case else caption} "
        for mark in ",.;:?!`":
            text = text.replace(mark, f" {mark} ")
        for blank in "\t\n\r":
            text = text.replace(blank, " ")
        found.append([number for number, entry in enumerate(entries) if f" {entry} " in text])
    return found


def by_caption(counts, entries):
    return [part.tolist() for part in np.split(entries, np.cumsum(counts)[:-1])]


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=20), entries_of, st.booleans())
def test_matches_are_those_of_the_plain_rule(captions, entries, ignore_case):
    if ignore_case:
        entries = list(dict.fromkeys(entry.lower() for entry in entries))
    counts, found = EntryMatcher(entries, ignore_case=ignore_case)(captions)
    assert counts.dtype == found.dtype == np.int32
    assert by_caption(counts, found) == plain(captions, entries, ignore_case)


def test_entries_inside_each_other_and_sharing_a_blank_all_count_once():
    entries = ["cat", "cat cat", "black cat", "a black cat", "black", "ca", "at"]
    captions = ["a black cat cat cat", "", "cats", "cat,black", "Black cat."]
    counts, found = EntryMatcher(entries)(captions)
    assert by_caption(counts, found) == [[0, 1, 2, 3, 4], [], [], [0, 4], [0]]


def test_punctuation_is_spaced_out_in_captions_and_not_in_entries():
    entries = ["U.S.", "U . S .", "don't", "end", "e-mail"]
    counts, found = EntryMatcher(entries)(["the U.S. don't\tend", "e-mail (end)"])
    assert by_caption(counts, found) == [[1, 2, 3], [4]]
    assert space_out(b"a,b\n`c`") == b" a , b  ` c `  "


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=9), entries_of, st.data())
def test_spellings_of_one_entry_count_once(captions, spellings, data):
    entries = data.draw(st.lists(st.integers(0, 4), min_size=len(spellings), max_size=len(spellings)))
    expected = [sorted({entries[each] for each in found}) for found in plain(captions, spellings)]
    assert by_caption(*EntryMatcher(spellings, entries)(captions)) == expected


def test_regular_plurals():
    pairs = "shirt shirts, watch watches, dress dresses, box boxes, baby babies, toy toys, shoe shoes, purse purses, tie ties"
    for one, many in (pair.split() for pair in pairs.split(", ")):
        assert plural(one) == many
        assert many in number_forms(one)
        assert f"red {one}" in number_forms(f"red {many}")
    for entry in ("", "of", "b", "日本", "x-2", "U . S .", "as"):
        assert number_forms(entry) == []


@given(st.text("aeyshxc", min_size=3, max_size=6))
def test_a_form_is_a_plural_or_has_it(word):
    """Of all words that can be meant: those that lose or change up to three letters."""
    near = {
        word[:cut] + end for cut in range(max(len(word) - 3, 0), len(word) + 1) for end in ("", "y", "s", "es", "ies")
    }
    assert {*number_forms(word)} == {plural(word), *(one for one in near if len(one) > 2 and plural(one) == word)}


def test_no_match_reaches_into_the_next_caption():
    counts, found = EntryMatcher(["a b", "a  b", "b"])(["x a", "b", "a", " b"])
    assert by_caption(counts, found) == [[], [2], [], [2]]


def test_many_captions_in_several_calls():
    captions = [f"word{number % 7} , other" for number in range(2 * CAPTIONS_PER_CALL + 5)]
    counts, found = EntryMatcher([f"word{number}" for number in range(7)])(captions)
    assert counts.tolist() == [1] * len(captions)
    assert found.tolist() == [number % 7 for number in range(len(captions))]
    counts, found = EntryMatcher(["x"])([])
    assert len(counts) == len(found) == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6), max_size=15), st.data())
def test_rates_are_one_less_the_chance_that_nothing_is_drawn(rows, data):
    probability = np.array(data.draw(st.lists(st.floats(0, 1), min_size=6, max_size=6)))
    counts = np.array([len(row) for row in rows], np.int32)
    entries = np.array([entry for row in rows for entry in row], np.int32)
    expected = [1 - np.prod([1 - probability[entry] for entry in row]) for row in rows]
    rates = keep_rates(counts, entries, probability)
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)
    assert ((rates >= 0) & (rates <= 1)).all()


def test_tiny_probabilities_keep_their_digits():
    rate = keep_rates(np.array([2], np.int32), np.array([0, 1], np.int32), np.array([1e-12, 2e-12]))
    assert rate[0] == pytest.approx(3e-12 - 2e-24, rel=1e-15)


def test_matches_that_dont_fit_are_refused():
    one = np.array([1], np.int32)
    for counts, entries, error in (
        (one, np.array([0, 0], np.int32), "2 matches"),
        (one, np.array([3], np.int32), "3 … 3"),
    ):
        with pytest.raises(ValueError, match=error):
            keep_rates(counts, entries, np.ones(3))


@given(
    st.lists(st.lists(st.integers(0, 6), unique=True, max_size=4).map(sorted), max_size=12),
    st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_the_rarest_of_a_captions_entries(found, frequency):
    counts = np.array([len(each) for each in found], np.int32)
    entries = np.array([entry for each in found for entry in each], np.int32)
    rarest = rarest_entries(counts, entries, np.array(frequency))
    assert rarest.dtype == np.int32
    assert rarest.tolist() == [min(each, key=lambda entry: (frequency[entry], entry), default=-1) for each in found]


def test_counts_must_be_those_of_the_entries():
    with pytest.raises(ValueError, match="the counts sum to 3"):
        rarest_entries(np.array([1, 2], np.int32), np.array([0], np.int32), np.arange(2))
