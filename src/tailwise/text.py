"""Text from outside (captions, keys, paths, column names, reasons), made safe to show."""

from __future__ import annotations

import re
import unicodedata

# Control and format characters, line and paragraph separators, lone surrogates: what a terminal obeys or cannot show.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SECRETS = re.compile(r"""(?<=://)[^/@\s'"]+@|(?<=\?)[^\s'"?]*=[^\s'"]*""")
_JOINERS = "\u200c\u200d"  # of scripts and emoji; they change no line and no direction


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


def redacted(text: str) -> str:
    """Return the text without what URLs in it may hold in secret: user names, passwords, and queries (signatures, tokens)."""
    return _SECRETS.sub(lambda found: "" if found[0].endswith("@") else "…", text) if "://" in text else text
