from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailwise.kernels.matching import EntryMatcher
from tailwise.kernels.phrases import STOP_WORDS, is_word, shrunk, terms

texts = st.lists(
    st.sampled_from(
        ["red", "Shoe", "of", "x2", "t-shirt", "é", "ää", "日本", "a|b", " ", " ", " ", ",", ".", "\t", "\u2028"]
    ),
    max_size=14,
).map("".join) | st.text(max_size=12)


@pytest.mark.parametrize(
    ("caption", "found", "ends"),
    [
        ("Nike Men Black Shoes", "Nike|Nike Men|Men|Men Black|Black|Black Shoes|Shoes", "Shoes|Black Shoes"),
        ("a dog, on The beach", "dog|beach", "dog|beach"),
        ("red cat with 2 red hats", "red|red cat|cat|red hats|hats", "red cat|cat|red hats|hats"),
        ("watch watch NB19", "watch|watch watch", "watch|watch watch"),
        ("lip  gloss", "lip|gloss", "lip|gloss"),
        ("(men) 'x' I 7 of", "", ""),
    ],
)
def test_words_and_pairs_and_those_at_the_end_of_a_phrase(caption, found, ends):
    assert terms(caption) == {term: term in ends.split("|") for term in found.split("|") if term}


@settings(deadline=None)
@given(texts)
def test_terms_match_their_caption_as_entries(caption):
    found = list(terms(caption))
    counts, _ = EntryMatcher(found)([caption]) if found else ([0], None)
    assert counts[0] == len(found)
    assert all(is_word(word) and word.lower() not in STOP_WORDS for term in found for word in term.split(" "))


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=30), max_size=8), st.integers(1, 9))
def test_frequent_terms_stay_however_counts_are_split(parts, most):
    merged = Counter()
    for part in parts:
        merged = shrunk(merged + shrunk(Counter(part), most), most)
    counts = Counter(letter for part in parts for letter in part)
    least = counts.total() // (most + 1)
    assert len(merged) <= most
    assert {letter for letter, count in counts.items() if count > least} <= set(merged)
    assert all(counts[letter] - least <= count <= counts[letter] for letter, count in merged.items())
