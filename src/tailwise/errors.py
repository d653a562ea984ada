"""Errors that the user can correct: one line with the value, what is allowed, and what to do. The command line exits with 2.

Messages name parameters as Python does, in backticks: "`keep` 2: must lie between 0 and 1". The command line shows them as its options.
"""

from tailwise.text import plain, redacted

MAX_CHARACTERS = 4_000  # of a message: a value from a file may be of any length


class UserError(Exception):
    """A mistake in what the user gave."""

    def __init__(self, message: str) -> None:
        """Take the message; show it on one line, of bounded length, with control characters as escapes.

        Passwords and signatures in URLs are left out.
        """
        line = plain(redacted(" ".join(message.split())))
        if len(line) > MAX_CHARACTERS:
            line = f"{line[: MAX_CHARACTERS // 2]} … {line[-MAX_CHARACTERS // 2 :]}"
        super().__init__(line)


class NotFoundError(UserError):
    """A file, a folder or an artifact does not exist."""


class ConflictError(UserError):
    """A name or a place is taken by something else, or an artifact was made with other settings."""


class DamagedError(UserError):
    """A file is not what was written or imported."""


class UnsupportedError(UserError):
    """A package, a device or a format is not available here."""
