"""The one exception that means: the user can mend this."""

from tailwise.text import plain, redacted

MAX_CHARACTERS = 4_000  # of a message: a value from a file may be of any length


class UserError(Exception):
    """A mistake in what the user gave: one line naming the value, the bound and the remedy; exit code 2."""

    def __init__(self, message: str) -> None:
        """Take the message; show it on one line, of bounded length, with control characters as escapes.

        Passwords and signatures in URLs are left out.
        """
        line = plain(redacted(" ".join(message.split())))
        if len(line) > MAX_CHARACTERS:
            line = f"{line[: MAX_CHARACTERS // 2]} … {line[-MAX_CHARACTERS // 2 :]}"
        super().__init__(line)
