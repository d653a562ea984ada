"""Captions as DataComp's baselines see them: words, tokens, characters, and words of a list; in one pass over the UTF-8 bytes.

A word is what `str.split()` gives. A token is what fastText's `tokenize` gives: only ASCII white space parts tokens, and each line feed is
a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tailwise.kernels.jit import jit

THREE_WORDS, TWO_TOKENS, SIX_CHARACTERS, LISTED, _OPEN = (np.uint8(1 << bit) for bit in range(5))
KELVIN = "\u212a"  # the only character of which str.lower makes an ASCII one
_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # of FNV-1a
Bytes = npt.NDArray[np.uint8]
_BLANK, _PARTS, _MAYBE = (
    np.uint8(1),
    np.uint8(2),
    np.uint8(4),
)  # kinds of bytes: white space; parts tokens; begins white space, perhaps
_KINDS = np.zeros(256, np.uint8)
_KINDS[[*range(9, 14), *range(28, 33)]] |= _BLANK
_KINDS[[0, *range(9, 14), 32]] |= _PARTS
_KINDS[[0xC2, 0xE1, 0xE2, 0xE3]] |= _MAYBE


@jit
def _blank_bytes(data: Bytes, at: int, stop: int) -> int:
    """Return the length in bytes of the white space character that is not ASCII and stands at a place, 0 if there is none."""
    first = data[at]
    if first == 0xC2:
        return 2 * int(at + 1 < stop and (data[at + 1] == 0x85 or data[at + 1] == 0xA0))
    if at + 2 >= stop or not 0xE1 <= first <= 0xE3:
        return 0
    second, third = data[at + 1], data[at + 2]
    if first == 0xE1:
        return 3 * int(second == 0x9A and third == 0x80)
    if first == 0xE3:
        return 3 * int(second == 0x80 and third == 0x80)
    if second == 0x81:
        return 3 * int(third == 0x9F)
    return 3 * int(second == 0x80 and (third <= 0x8A or 0xA8 <= third <= 0xA9 or third == 0xAF))


@jit
def _find(
    data: Bytes,
    start: int,
    stop: int,
    hashed: np.uint64,
    slots: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64],
    words: Bytes,
) -> int:
    """Return the slot of a word, in lower case, or the free slot where it belongs."""
    slot: int = np.int64(hashed & np.uint64(len(slots) - 1))
    while slots[slot] >= 0:
        first, last = ends[slots[slot]], ends[slots[slot] + 1]
        same = last - first == stop - start
        at = 0
        while same and at < stop - start:
            byte = data[start + at]
            same = words[first + at] == (byte + 32 if 65 <= byte <= 90 else byte)
            at += 1
        if same:
            break
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@jit
def _fill(slots: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], words: Bytes) -> None:
    """Put each word into its slot of a hash table."""
    for number in range(len(ends) - 1):
        hashed = _OFFSET
        for at in range(ends[number], ends[number + 1]):
            hashed = (hashed ^ np.uint64(words[at])) * _PRIME
        slots[_find(words, ends[number], ends[number + 1], hashed, slots, ends, words)] = number


@jit
def _look(
    offsets: npt.NDArray[np.int32],
    data: Bytes,
    slots: npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64],
    words: Bytes,
    facts: Bytes,
) -> None:
    """Fill the facts of each caption; _OPEN where a word that decides about LISTED is not ASCII."""
    kinds, listing = _KINDS, len(ends) > 1
    for row in range(len(facts)):
        at, stop = offsets[row], offsets[row + 1]
        count = tokens = characters = 0
        found, word, hashed, in_token, is_ascii = np.uint8(0), -1, _OFFSET, False, True
        while at <= stop:
            byte = data[at] if at < stop else np.uint8(32)
            kind = kinds[byte]
            blank = _blank_bytes(data, at, stop) if kind == _MAYBE else np.int64(kind & _BLANK)
            if blank and word >= 0:
                if not is_ascii:
                    found |= _OPEN
                elif listing and slots[_find(data, word, at, hashed, slots, ends, words)] >= 0:
                    found |= LISTED
                word = -1
            elif not blank:
                if word < 0:
                    word, hashed, is_ascii = at, _OFFSET, True
                    count += 1
                is_ascii &= byte < 0x80
                hashed = (hashed ^ np.uint64(byte + 32 if 65 <= byte <= 90 else byte)) * _PRIME
            if at == stop:
                break
            tokens += int(byte == 10) + int(not (kind & _PARTS or in_token))
            in_token = not kind & _PARTS
            characters += int(byte & 0xC0 != 0x80)
            at += max(blank, 1)
            if characters > 5 and count > 2 and tokens > 1 and (found & LISTED or not listing):
                break
        if count > 2:
            found |= THREE_WORDS
        if tokens > 1:
            found |= TWO_TOKENS
        if characters > 5:
            found |= SIX_CHARACTERS
        facts[row] = found


class CaptionFacts:
    """Facts about captions, with a list of words."""

    def __init__(self, words: Iterable[str] = ()) -> None:
        """Take the words of the list, in lower case."""
        self._words = {*words}
        self._is_ascii = all(map(str.isascii, self._words))
        coded = [word.encode() for word in sorted(self._words)]
        self._bytes = np.frombuffer(b"".join(coded) or b"\0", np.uint8)
        self._ends = np.cumsum([0, *map(len, coded)], dtype=np.int64)
        self._slots = np.full(1 << (2 * len(coded)).bit_length(), -1, np.int32)
        _fill(self._slots, self._ends, self._bytes)

    def __call__(self, captions: pa.Array) -> Bytes:
        """Return the facts of captions (string [n], without null): uint8 [n].

        THREE_WORDS: three words or more; TWO_TOKENS: two tokens or more; SIX_CHARACTERS: six code points or more; LISTED: a word, in lower
        case, is in the list.
        """
        offsets, data = captions.buffers()[1:]
        facts = np.empty(len(captions), np.uint8)
        if len(captions):
            places = np.frombuffer(offsets, np.int32, len(captions) + 1, 4 * captions.offset)
            letters = np.frombuffer(data or b"\0", np.uint8)
            _look(places, letters, self._slots, self._ends, self._bytes, facts)
        is_open = facts & _OPEN > 0
        if self._is_ascii and is_open.any():
            is_open &= pc.match_substring(captions, KELVIN).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(is_open):  # str.lower knows all alphabets
            if any(word.lower() in self._words for word in captions[int(row)].as_py().split()):
                facts[row] |= LISTED
        return np.asarray(facts & ~_OPEN)
