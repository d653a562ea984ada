"""Words and pairs of words of captions, and the frequent ones of many captions in bounded memory.

The end of a phrase names what it is about: "Nike Men Black Shoes", "a dog on a beach". No parser is needed for it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np

from tailwise.kernels.matching import space_out

# English words of closed classes: articles, pronouns, prepositions, conjunctions, auxiliary verbs.
STOP_WORDS = frozenset(
    """
    a an the this that these those some any all no each every another other such same more most few both either neither
    i me my we us our you your he him his she her it its they them their who whom whose which what
    of in on at by for from to with without into onto over under up down out off about above below between through during before after
    against across along around behind beside near inside outside upon within via per as than like
    and or but nor so if then because while when where why how not
    is am are was were be been being has have had do does did will would can could may might must shall should
    """.split()  # noqa: SIM905
)


@lru_cache(1 << 16)
def is_word(token: str) -> bool:
    """Return whether a token of a caption is a word: it has two or more characters, no digit, and is no stop word of English."""
    return (
        len(token) > 1
        and token[0].isalpha()
        and unicodedata.category(token[-1])[0] in "LM"
        and token.isprintable()
        and not any(letter.isdigit() for letter in token)
        and token.lower() not in STOP_WORDS
    )


def terms(caption: str) -> dict[str, bool]:
    """Return the words of a caption, and the pairs of words with one blank between; True for those that end a phrase.

    A phrase ends before what is no word (`is_word`), a punctuation mark of `space_out`, a second blank, and the end of the caption. Each
    term matches the caption as an entry of `EntryMatcher`.
    """
    words = [token if is_word(token) else "" for token in space_out(caption.encode()).decode().split(" ")]
    found: dict[str, bool] = {}
    for before, word, after in zip(words, words[1:], words[2:], strict=False):
        for term in (word, f"{before} {word}")[: bool(word) + bool(word and before)]:
            found[term] = found.get(term, False) or not after
    return found


def shrunk(counts: Counter[str], most: int) -> Counter[str]:
    """Return at most `most` of the counts, each less the greatest one left out: after Misra and Gries (1982).

    Counts may be shrunk and added in any order, any number of times: every term that occurs more than n // (most + 1) times among n stays
    (Agarwal et al., PODS 2012).
    """
    if len(counts) <= most:
        return counts
    cut = int(np.partition(np.fromiter(counts.values(), np.int64, len(counts)), -most - 1)[-most - 1])
    return Counter({term: count - cut for term, count in counts.items() if count > cut})
