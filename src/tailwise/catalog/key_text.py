r"""Keys in text files: one a line, and each comes back as it was.

A line is the key itself, to the byte; blanks, tabs, quotes and comment signs are part of it. A key that a line cannot hold is written as
a backslash and the key as a JSON string: \"two\nlines". Such are the empty key, keys with a line feed or carriage return, keys that
begin with a byte order mark, and keys that begin with \" themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

from tailwise.errors import UserError

ESCAPED = '\\"'  # what an escaped line begins with
BYTE_ORDER_MARK = "\ufeff"


def line_of(key: str) -> str:
    """Return the line that stands for a key, without its line feed."""
    if not key or "\n" in key or "\r" in key or key.startswith((ESCAPED, BYTE_ORDER_MARK)):
        return "\\" + json.dumps(key)
    return key


def key_of(line: str) -> str:
    """Return the key that a line stands for.

    Raises:
        ValueError: the line begins as an escaped one, and is none.
    """
    if not line.startswith(ESCAPED):
        return line
    key = json.loads(line[1:])
    if not isinstance(key, str):
        raise ValueError(f"{line[1:]} is no string")
    return key


def read_keys(path: Path) -> list[str]:
    """Return the keys of a text file. Lines end at a line feed, or a carriage return and a line feed; empty lines are passed over.

    Raises:
        UserError: it is not UTF-8 text, or an escaped line is damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): give a key or uid a line") from error
    keys = []
    for number, ended in enumerate(text.split("\n"), start=1):
        line = ended.removesuffix("\r")
        try:
            keys += [key_of(line)] if line else []
        except ValueError as error:
            raise UserError(
                f'line {number:,} of {path} begins with \\", and no JSON string follows the backslash ({error}): see docs/exports.md, or '
                "name the key in a .parquet"
            ) from error
    return keys
