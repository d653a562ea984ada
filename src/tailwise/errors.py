"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave: one line naming the value, the bound and the remedy; exit code 2."""
