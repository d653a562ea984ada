"""The one exception that means: the user can mend this."""

from tailwise.text import plain


class UserError(Exception):
    """A mistake in what the user gave: one line naming the value, the bound and the remedy; exit code 2."""

    def __init__(self, message: str) -> None:
        """Take the message. Line breaks, as in other libraries' errors, become spaces; control characters become escapes."""
        super().__init__(plain(" ".join(message.split())))
