"""Hashes of what the sources note of a sample: the url of its image, and the sha256 and md5 of the image that was there.

An import keeps them in columns of the samples, of 128 bits each: samples are found by them without their sources, and a text of any
length takes no more room. The hash of a url is BLAKE2b; of a sha256, the exclusive or of its halves; of an md5, the md5 itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NOTED = ("url", "sha256", "md5")
HASH_COLUMNS = {name: f"{name}_hash" for name in NOTED}  # of the samples of a part; nullable binary(16)
HASH_TYPE = pa.binary(16)
KEPT = "noted"  # in the record of a part: the names of NOTED whose hashes its import kept
HEX_DIGITS = {"sha256": 64, "md5": 32}
_HEX = {name: re.compile(f"[0-9a-fA-F]{{{digits}}}") for name, digits in HEX_DIGITS.items()}


def text_hash(text: str) -> bytes:
    """Return the 128-bit BLAKE2b hash of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def noted_hash(name: str, text: object) -> bytes | None:
    """Return the hash of a value of `name`, one of NOTED; None if it is none: "" or no text, or no hexadecimal digits of that length."""
    if not isinstance(text, str) or not text:
        return None
    if name not in HEX_DIGITS:
        return text_hash(text)
    return _folded(np.frombuffer(bytes.fromhex(text), np.uint8)[None]).tobytes() if _HEX[name].fullmatch(text) else None


def noted_hashes(name: str, texts: pa.Array) -> pa.Array:
    """Return the hash of each text [n], see `noted_hash`: binary(16) [n], null where there is none."""
    if name not in HEX_DIGITS:
        return pa.array([noted_hash(name, text) for text in texts.to_pylist()], HASH_TYPE)
    hashes, good = hex_bytes(texts, HEX_DIGITS[name])
    filled = np.zeros((len(good), 16), np.uint8)
    filled[good] = _folded(hashes)
    values = pa.FixedSizeBinaryArray.from_buffers(HASH_TYPE, len(good), [None, pa.py_buffer(filled)])
    return pc.if_else(pa.array(good), values, pa.scalar(None, HASH_TYPE))


def _folded(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return values of 16 or 32 bytes, [n, bytes], as 16 bytes, [n, 16]."""
    return values if values.shape[1] == 16 else values[:, :16] ^ values[:, 16:]


def hex_bytes(texts: pa.Array, digits: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return the bytes of the m texts of `digits` hexadecimal digits, uint8 [m, digits / 2]; and a mask of them, bool [n]."""
    good = pc.match_substring_regex(texts, f"^[0-9a-fA-F]{{{digits}}}$").fill_null(False)
    joined = "".join(texts.filter(good).to_pylist())
    return np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, digits // 2), good.to_numpy(zero_copy_only=False)


def noted_record(values: Mapping[str, object]) -> dict[str, bytes]:
    """Return the hashes of what a mapping notes, by the column of the samples."""
    found = {HASH_COLUMNS[name]: noted_hash(name, values.get(name)) for name in NOTED}
    return {column: value for column, value in found.items() if value is not None}


def hash_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of hashes among some names of columns, in the order of NOTED."""
    there = {*names}
    return [column for column in HASH_COLUMNS.values() if column in there]
