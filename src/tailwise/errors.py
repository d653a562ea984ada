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


# --- the bound on what may be rejected: one for all commands, with both values in its message -----------------------------


class PartDoneError(Exception):
    """A part of a run has done its share: a message for people, no mistake.

    Attributes:
        unfinished: number of items of the step that other parts have not done.
    """

    def __init__(self, message: str, unfinished: int) -> None:
        super().__init__(message)
        self.unfinished = unfinished


MAX_REJECTED = 0.1  # share of samples or rows, by default


def check_share(share: float, name: str = "max_rejected") -> None:
    """Raise a UserError for a bound, a parameter of this name, that is not in [0, 1]."""
    if not 0 <= share <= 1:
        raise UserError(f"`{name}` {share}: must lie between 0 and 1, such as 0.1 for 10 %")


def refuse_many(
    rejected: int, seen: int, max_rejected: float, what: str, causes: str, option: str = "`max_rejected`"
) -> None:
    """Raise a UserError if more than a share of what was read was rejected.

    `what` says what they are and what happened to them: "{} images{} can't be embedded"; counts and share are filled in. `causes` are the
    reasons, an example, and what is kept; `option` sets the share.
    """
    if rejected > max_rejected * seen:
        summary = what.format(f"{rejected:,} of {seen:,}", f" ({rejected / seen:.1%})")
        raise UserError(
            f"{summary}, more than {option} {max_rejected:g}: {causes}: mend the pool, or repeat this command with a greater {option}"
        )
