"""Substring matching of captions against a list of entries, and balancing by it, after MetaCLIP (arXiv 2309.16671).

Letters: n captions, K entries, m matches.
"""

from __future__ import annotations

from collections.abc import Sequence

import ahocorasick_rs
import numpy as np
import numpy.typing as npt

from tailwise.kernels.jit import jit

CAPTIONS_PER_CALL = 1024
_PUNCTUATION = (b",", b".", b";", b":", b"?", b"!", b"`")
_BLANKS = bytes.maketrans(b"\t\n\r", b"   ")
_SEPARATOR = b"\xff"  # in no UTF-8 text, so that no match reaches from one caption into the next


def space_out(text: bytes) -> bytes:
    """UTF-8 text with a blank before and after, blanks round each of `,.;:?!` and the backquote, and tabs and line ends as blanks."""
    for mark in _PUNCTUATION:
        text = text.replace(mark, b" " + mark + b" ")
    return b" " + text.translate(_BLANKS) + b" "


def plural(word: str) -> str:
    """Return the regular plural of an English word: -es after s, x, z, ch, sh; -ies for a consonant and y; else -s."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2:-1] not in set("aeiou") else word + "s"


def number_forms(entry: str) -> list[str]:
    """Return the regular plural of an entry's last word, and the words whose regular plural it is, each in its place.

    Words and singulars of fewer than three letters have none, nor do words that do not end in an English letter.
    """
    before, blank, word = entry.rpartition(" ")
    if len(word) < 3 or not (word[-1].isascii() and word[-1].isalpha()):
        return []
    singulars = [one for one in (word[:-3] + "y", word[:-2], word[:-1]) if len(one) > 2 and plural(one) == word]
    return [before + blank + form for form in (plural(word), *singulars)]


class EntryMatcher:
    """Finds the entries that stand in captions: entry E in caption T if " E " is in T spaced out (`space_out`).

    Entries are not spaced out: one with punctuation matches only if it is written with the blanks, as in MetaCLIP's own code.
    """

    def __init__(
        self, spellings: Sequence[str], entries: Sequence[int] | None = None, *, ignore_case: bool = False
    ) -> None:
        """Builds the automaton: about a microsecond and 300 bytes per character of the spellings.

        Args:
            spellings: different ones, none of them empty.
            entries: number of the entry that each one spells; None if each spells one of its own.
            ignore_case: compare in lower case; the spellings must be so already.
        """
        patterns = [b" " + spelling.encode() + b" " for spelling in spellings]
        self._entries = np.array(range(len(patterns)) if entries is None else entries, np.int64)
        self.ignore_case = ignore_case
        self._automaton = ahocorasick_rs.BytesAhoCorasick(
            patterns, implementation=ahocorasick_rs.Implementation.ContiguousNFA
        )

    def __call__(self, captions: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Which entries stand in which captions.

        `captions`: n texts.

        Returns:
            How many entries each caption has, int32 [n]; and which, caption after caption, ascending, each once: int32 [m].
        """
        pieces = [
            self._match(captions[start : start + CAPTIONS_PER_CALL])
            for start in range(0, len(captions), CAPTIONS_PER_CALL)
        ]
        empty = np.empty(0, np.int32)
        return (
            np.concatenate([empty, *(counts for counts, _ in pieces)]),
            np.concatenate([empty, *(entries for _, entries in pieces)]),
        )

    def _match(self, captions: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        texts = (caption.lower() if self.ignore_case else caption for caption in captions)
        haystack = space_out((b" " + _SEPARATOR + b" ").join([text.encode() for text in texts]))
        found = np.array(self._automaton.find_matches_as_indexes(haystack, overlapping=True), np.int64).reshape(-1, 3)
        separators = np.flatnonzero(np.frombuffer(haystack, np.uint8) == _SEPARATOR[0])
        caption = np.searchsorted(separators, found[:, 1])
        # An entry counts once, however often it stands there.
        pairs = np.unique(caption << 32 | self._entries[found[:, 0]])
        counts = np.bincount(pairs >> 32, minlength=len(captions))
        return counts.astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)


def _check(counts: npt.NDArray[np.int32], entries: npt.NDArray[np.int32], how_many: int) -> None:
    """Refuses matches that don't fit each other or the list."""
    if counts.sum(dtype=np.int64) != len(entries) or counts.min(initial=0) < 0:
        raise ValueError(f"{len(entries)} matches, where the counts sum to {counts.sum(dtype=np.int64)}")
    if len(entries) and not (entries.min() >= 0 and entries.max() < how_many):
        raise ValueError(f"entries {entries.min()} … {entries.max()}: must lie in [0, {how_many})")


@jit
def _rarest_entries(
    counts: npt.NDArray[np.int32],
    entries: npt.NDArray[np.int32],
    frequency: npt.NDArray[np.int64],
    rarest: npt.NDArray[np.int32],
) -> None:
    at = 0
    for row in range(len(counts)):
        best = -1
        for entry in entries[at : at + counts[row]]:
            if best < 0 or frequency[entry] < frequency[best]:
                best = entry
        rarest[row] = best
        at += counts[row]


def rarest_entries(
    counts: npt.NDArray[np.int32], entries: npt.NDArray[np.int32], frequency: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The rarest of each caption's entries, of equally rare ones the first; −1 without entries.

    Args:
        counts: int32 [n], as `EntryMatcher` gives them.
        entries: int32 [m].
        frequency: int64 [K], of each entry.

    Returns:
        int32 [n].

    Raises:
        ValueError: the counts don't sum to m, or an entry is outside [0, K).
    """
    _check(counts, entries, len(frequency))
    rarest = np.empty(len(counts), np.int32)
    _rarest_entries(np.ascontiguousarray(counts), np.ascontiguousarray(entries), frequency, rarest)
    return rarest


@jit
def _keep_rates(
    counts: npt.NDArray[np.int32],
    entries: npt.NDArray[np.int32],
    probability: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
) -> None:
    at = 0
    for row in range(len(counts)):
        rate = 0.0
        for entry in entries[at : at + counts[row]]:
            rate += probability[entry] * (1 - rate)  # as 1 − Π (1 − p), but exact also where p is tiny
        rates[row] = rate
        at += counts[row]


def keep_rates(
    counts: npt.NDArray[np.int32], entries: npt.NDArray[np.int32], probability: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The probability that at least one of a caption's entries is drawn: 1 − Π (1 − p); 0 without entries.

    Args:
        counts: int32 [n], as `EntryMatcher` gives them.
        entries: int32 [m].
        probability: float64 [K], of each entry, each drawn by itself for each caption.

    Returns:
        float64 [n].

    Raises:
        ValueError: the counts don't sum to m, or an entry is outside [0, K).
    """
    _check(counts, entries, len(probability))
    rates = np.empty(len(counts), np.float64)
    _keep_rates(np.ascontiguousarray(counts), np.ascontiguousarray(entries), probability, rates)
    return rates
