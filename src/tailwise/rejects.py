"""The bound on what may be rejected: one for all commands, with both values in its message."""

from __future__ import annotations

from tailwise.errors import UserError

MAX_REJECTED = 0.1  # share of samples or rows, by default


def check_share(max_rejected: float) -> None:
    """Refuse a bound on rejects that is no share.

    Raises:
        UserError: it is not in [0, 1].
    """
    if not 0 <= max_rejected <= 1:
        raise UserError(f"`max_rejected` {max_rejected}: must lie between 0 and 1, such as 0.1 for 10 %")


def refuse_many(
    rejected: int, seen: int, max_rejected: float, what: str, causes: str, option: str = "`max_rejected`"
) -> None:
    """Stop where more than a share of what was read was rejected.

    Args:
        rejected: how many.
        seen: of how many.
        max_rejected: the share.
        what: they are, and what happened to them: "{} images{} can't be embedded"; the counts and the share are filled in.
        causes: reasons, an example, and what is kept.
        option: that sets the share.

    Raises:
        UserError: so it is.
    """
    if rejected > max_rejected * seen:
        summary = what.format(f"{rejected:,} of {seen:,}", f" ({rejected / seen:.1%})")
        raise UserError(
            f"{summary}, more than {option} {max_rejected:g}: {causes}: mend the pool, or repeat this command with a greater {option}"
        )
