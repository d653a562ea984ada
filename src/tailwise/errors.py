"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave: one line naming the value, the bound and the remedy; exit code 2."""

    def __init__(self, message: str) -> None:
        """Takes the message; line breaks, as other libraries' errors have them, become spaces."""
        super().__init__(" ".join(message.split()))
