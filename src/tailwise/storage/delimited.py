r"""Text files of users: tables of CSV or TSV, lists of a value a line, JSON. Every reader of such files uses these functions.

Keys in text are read literally: blanks, quotes and comment signs are part of a key. A key that does not fit a line is written as a
backslash and the key as a JSON string: \"two\nlines". These are the empty key, keys with a line feed, carriage return or NUL, keys that
start with a byte order mark, and keys that start with \" themselves.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tailwise.errors import UserError
from tailwise.storage.files import open_binary

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_READABLE = "give UTF-8, or UTF-16 with its byte order mark"

MAX_LINE = 1_000_000  # characters of a row of a table
MAX_TEXT = 200_000_000  # characters of a list or JSON text, which is held in memory
ESCAPED = '\\"'  # start of the line of an escaped key


def read_text(source: Path | str | bytes, most: int = MAX_TEXT) -> str:
    """Return a text in UTF-8, or in UTF-16 with a byte order mark, with every line break as a line feed.

    `source` is the path or URL of a file, or its bytes. A text of another encoding, or of more than `most` characters, is a ValueError.
    """
    text, size = [], 0
    for line in _lines(source, most):
        text.append(line)
        size += len(line)
        if size > most:
            raise ValueError(f"it has more than {most:,} characters")
    return "".join(text)


def read_keys(path: Path) -> list[str]:
    """Return the keys of a list, one a line, without empty lines; raise a UserError if it cannot be read, or an escaped line is damaged."""
    try:
        lines = enumerate(read_text(path).split("\n"), start=1)
        return [key_of(line, number) for number, line in lines if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as a list of keys: {error}") from error


def iterate_keys(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and key of each line of a list that is not empty; an OSError or ValueError if it cannot be read."""
    for number, line in enumerate(_lines(path), start=1):
        if text := line.removesuffix("\n"):
            yield number, key_of(text, number)


def line_of(key: str) -> str:
    """Return the line of a key, without its line feed."""
    if not key or any(end in key for end in "\n\r\0") or key.startswith((ESCAPED, "\ufeff")):
        return "\\" + json.dumps(key)
    return key


def key_of(line: str, number: int) -> str:
    """Return the key of a line; raise a ValueError with the line's number if the line is escaped and damaged."""
    if not line.startswith(ESCAPED):
        return line
    try:
        key = json.loads(line[1:])
    except ValueError:
        key = None
    if not isinstance(key, str):
        problem = f'line {number:,} begins with \\", and no JSON string follows the backslash'
        raise ValueError(f"{problem}: see docs/guides/exports.md, or give the keys as a .parquet file")
    return key


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:  # noqa: ANN401  (any JSON value)
    """Return the value of a JSON text; raise a ValueError if it is not JSON, nested too deeply, or if `unique` gives a name twice."""

    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(given)
        if len(found) < len(given):
            name = next(name for name, count in Counter(name for name, _ in given).items() if count > 1)
            raise ValueError(f"it gives {name!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=pairs if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row of a table, its header first; all have as many fields as the header.

    A file whose first line has tabs is TSV: a quote is an ordinary character. Otherwise it is CSV: a field may be in quotes, but only on
    one line, so that an unclosed quote does not swallow rows. Blank lines are skipped. A row of another number of fields, or with an
    unclosed quote, and a file that is not text, are a ValueError.
    """
    lines = _lines(path)
    first = next(lines, "")
    tabs, width = "\t" in first, 0
    for number, line in enumerate(chain([first], lines), 1):
        text = line.removesuffix("\n")
        if not text:
            continue
        fields = text.split("\t") if tabs else _fields(text, number)
        width = width or len(fields)
        if len(fields) != width:
            raise ValueError(f"line {number:,} has {len(fields):,} fields, the header {width:,}")
        yield number, fields


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line, without blank lines; a line that is none is a ValueError."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number:,} is not JSON: {error}") from error
            if not isinstance(value, dict):
                raise ValueError(f"line {number:,} is not a JSON object")
            yield value


def _fields(line: str, number: int) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        remedy = "close it, double quotes inside a quoted field, or give a .tsv or .parquet file"
        raise ValueError(f"line {number:,} has a quote that isn't closed in that line ({error}): {remedy}") from error


def _lines(source: Path | str | bytes, longest: int = MAX_LINE) -> Iterator[str]:
    """Yield lines of at most `longest` characters; only line feeds and carriage returns end lines, and each becomes a line feed."""
    with io.BytesIO(source) if isinstance(source, bytes) else open_binary(str(source)) as stream:
        head = stream.read(4)
        stream.seek(0)
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
        text = io.TextIOWrapper(stream, encoding)
        try:
            while line := text.readline(longest + 1):
                if "\0" in line:
                    raise ValueError(f"it holds NUL characters, as UTF-16 without byte order mark does: {_READABLE}")
                if len(line) > longest:
                    raise ValueError(f"it has a line of more than {longest:,} characters")
                yield line
        except UnicodeError as error:
            name = encoding.removesuffix("-sig").upper()
            raise ValueError(f"it is not {name} text ({error}): {_READABLE}") from error
