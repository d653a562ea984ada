"""The one exception that means: the user can mend this."""

from tailwise.text import plain, redacted


class UserError(Exception):
    """A mistake in what the user gave: one line naming the value, the bound and the remedy; exit code 2."""

    def __init__(self, message: str) -> None:
        """Take the message. Line breaks, as in other libraries' errors, become spaces; control characters become escapes.

        Passwords and signatures in URLs are left out.
        """
        super().__init__(plain(redacted(" ".join(message.split()))))
