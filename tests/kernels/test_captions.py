"""Facts about captions, against Python's own functions."""

import re
import sys

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tailwise.kernels.captions import KELVIN, LISTED, SIX_CHARACTERS, THREE_WORDS, TWO_TOKENS, CaptionFacts

BLANKS = [chr(point) for point in range(sys.maxunicode + 1) if chr(point).isspace()]
LETTERS = [*"abkABK é中İ\0\x1b\u200b\ufeff\u180e\u2010", KELVIN, *BLANKS]
WORDS = {"a", "ab", "k", "bab"}


def facts(text, words):
    tokens = re.findall(r"\n|[^ \n\r\t\v\f\0]+", text)  # as fastText's `readWord`
    return (
        THREE_WORDS * (len(text.split()) > 2)
        | TWO_TOKENS * (len(tokens) > 1)
        | SIX_CHARACTERS * (len(text) > 5)
        | LISTED * any(word.lower() in words for word in text.split())
    )


@given(
    st.lists(st.text(st.sampled_from(LETTERS), max_size=12), max_size=20),
    st.sampled_from([set(), WORDS, WORDS | {"é", "aİ".lower(), "中"}]),
)
def test_facts_are_those_of_python(texts, words):
    assert CaptionFacts(words)(pa.array(texts, pa.string())).tolist() == [facts(text, words) for text in texts]


def test_a_slice_of_an_array():
    captions = pa.array(["a b c d e", "one", "a ab"])[1:]
    assert CaptionFacts(WORDS)(captions).tolist() == [facts(text, WORDS) for text in ("one", "a ab")]


def test_each_word_of_a_long_list_is_found():
    words = [f"word{number}" for number in range(5000)]
    found = CaptionFacts(words)(pa.array([*(f"x {word.upper()} y" for word in words), "word5000", "word", "x"]))
    np.testing.assert_array_equal(found & LISTED > 0, [True] * 5000 + [False] * 3)
