"""Text files of users: tables of CSV or TSV, lists of a value a line, JSON. Every reader of such files uses these functions."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_READABLE = "give UTF-8, or UTF-16 with its byte order mark"

MAX_LINE = 1_000_000  # characters of a row of a table
MAX_TEXT = 200_000_000  # characters of a list or JSON text that is held in memory


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark, every line break as a line feed.

    Raises:
        ValueError: it is in another encoding, or longer than MAX_TEXT.
        OSError: it can't be read.
    """
    text, size = [], 0
    for line in _lines(path, MAX_TEXT):
        text.append(line)
        size += len(line)
        if size > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT:,} characters")
    return "".join(text)


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401  (whatever was written)
    """Return the value of a JSON text.

    Raises:
        ValueError: it isn't JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each row of a table, its header first; all have as many fields as the header.

    A file whose first line has tabs is TSV: a quote is a character like any other. Else it is CSV: a field may stand in quotes, but
    only within one line, so that an unclosed quote swallows no rows. Blank lines are passed over.

    Raises:
        ValueError: a row has another number of fields, or an unclosed quote, or the file is not text.
        OSError: it can't be read.
    """
    lines = _lines(path)
    first = next(lines, "")
    tabs = "\t" in first
    width = 0
    for number, line in enumerate(_chained(first, lines), 1):
        text = line.removesuffix("\n")
        if not text:
            continue
        fields = text.split("\t") if tabs else _fields(text, number)
        width = width or len(fields)
        if len(fields) != width:
            raise ValueError(f"line {number:,} has {len(fields):,} fields, the header {width:,}")
        yield number, fields


def _chained(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _fields(line: str, number: int) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(
            f"line {number:,} has a quote that isn't closed in that line ({error}): close it, double quotes inside a quoted field, "
            "or give a .tsv or .parquet file"
        ) from error


def _lines(path: Path, longest: int = MAX_LINE) -> Iterator[str]:
    """Yield lines of at most `longest` characters, each with a line feed.

    Only line feeds and carriage returns end lines, not the other separators of Unicode.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
    try:
        with path.open(encoding=encoding) as stream:
            while line := stream.readline(longest + 1):
                if "\0" in line:
                    raise ValueError(f"it holds NUL characters, as UTF-16 without byte order mark does: {_READABLE}")
                if len(line) > longest:
                    raise ValueError(f"it has a line of more than {longest:,} characters")
                yield line
    except UnicodeError as error:
        raise ValueError(f"it is not {encoding.removesuffix('-sig').upper()} text ({error}): {_READABLE}") from error
