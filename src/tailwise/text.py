"""Text from outside (captions, keys, paths, column names, reasons), made safe to show."""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Control and format characters, line and paragraph separators, lone surrogates: what a terminal obeys or cannot show.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SECRETS = re.compile(r"""(?<=://)[^/@\s'"]+@|(?<=\?)[^\s'"?]*=[^\s'"]*""")
_JOINERS = "\u200c\u200d"  # of scripts and emoji; they change no line and no direction
# A spreadsheet takes a cell that begins so for a formula, and runs it; the wide forms are those of Chinese and Japanese keyboards.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def plain(text: object) -> str:
    """Return `str(text)` on one line, with every character that a terminal would obey written as an escape.

    A caption from the web may hold escape sequences, line breaks or marks that reverse the writing direction. Everything that a
    command prints, logs or raises and that came from a file passes through here. Printable text comes back unchanged.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        letter.encode("unicode_escape").decode("ascii")
        if letter not in _JOINERS and unicodedata.category(letter) in _UNSAFE
        else letter
        for letter in line
    )


def storable(text: str) -> str:
    """Return a text as Parquet and JSON can hold it: in ASCII, with escapes, where it did not come from UTF-8."""
    return text if is_unicode(text) else ascii(text)


def redacted(text: str) -> str:
    """Return the text without what URLs in it may hold in secret: user names, passwords, and queries (signatures, tokens)."""
    return _SECRETS.sub(lambda found: "" if found[0].endswith("@") else "…", text) if "://" in text else text


def spreadsheet_cell(text: str) -> str:
    """Return text for a cell of a CSV that people open: after a ', a spreadsheet shows it and does not run it as a formula.

    Every CSV and TSV with text from outside passes through here. Lists that commands read again (keys, rates) do not: their keys
    come back to the byte.
    """
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


# Spellings of earlier versions, which still work on the command line and in recipes.
OLD_COMMANDS = {"removed": "excluded"}
OLD_OPTIONS = {
    "cluster": {"clusters": "k"},
    "dedup": {"clusters-name": "clustering", "keep": "order"},
    "plan": {"clusters": "clustering"},
    "explain": {"clusters": "by-cluster"},
    "import": {"clusters-name": "clustering"},
}


def new_spelling(command: str, option: str) -> str:
    """Return the present name of a command's option, without dashes."""
    return OLD_OPTIONS.get(command, {}).get(option, option)


def dashed(name: str) -> str:
    """Return the option of the command line that a parameter is: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line, their names with dashes: {"aug_cfg": {"scale": (0.4, 1)}, "local-loss": True}.

    True is a flag, False and None leave it out, a list gives several words, a mapping words of the form key=value.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(dashed(name))
        if isinstance(value, Mapping):
            words += [f"{key}={tuple(item) if isinstance(item, list) else item}" for key, item in value.items()]
        elif isinstance(value, list | tuple):
            words += [str(item) for item in value]
        elif value is not True:
            words.append(str(value))
    return words


def command_line(command: str, *words: object, **options: object) -> str:
    """Return a command of tailwise as a user types it: a remedy in a message. "…" stands for what the user fills in."""
    typed = [command, *map(str, words), *option_words(options)]
    return f"`tailwise {' '.join(word if word == '…' else shlex.quote(word) for word in typed)}`"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the known name nearest to an unknown one; None if none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def enumerated(names: Sequence[str], most: int = 12) -> str:
    """Return names as a list in a sentence; after `most`, how many more there are. "none" for no names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most]) or 'none'}{more}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the nearest one, or all of them if none is near."""
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near!r}?" if near else f"use {', '.join(names)}"


def is_unicode(text: str) -> bool:
    """Return whether files can hold the text. They cannot hold lone surrogates, as Python makes them of bytes that are not UTF-8."""
    return text.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in text)
