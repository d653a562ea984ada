"""What users can ask for: dataclasses whose fields, defaults and docstrings give the options of the command line and Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tailwise.errors import UserError

OPTION = "option"  # in a field's metadata: the name of the option, where the field's own name does not tell; yes/no for a switch
OptionValue = str | int | float


@dataclass(frozen=True)
class ScoreRequest:
    """Which score, and how.

    Attributes:
        name: of SCORES, or of a numeric column of the samples; with the option "file", of a column of that file.
        options: names of OPTIONS that the score has; those left out have their defaults.
    """

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made of. None means the method's own default.

    Attributes:
        method: See below.
        keep: Budget, as a share of the pool: all imported samples that are not removed, dropped ones included.
        budget: Budget, in samples: per epoch, or in all if static.
        per_cluster: cap, flat: at most this number of samples of each cluster.
        clustering: Name of the clustering, or grouping.  [default: main]
        without: A drop list (of dedup or filter), whose samples take no part; may be given again.
        alpha: dynamics: quota in proportion to size^alpha.  [default: 0.2]
        alpha_end: dynamics: alpha after `anneal_epochs`; linear until then.
        anneal_epochs: See `alpha_end`.
        temperature: dbp: of the softmax over complexity.  [default: 0.1]
        neighbours: dbp: number of nearest other centroids that d_inter is taken over.  [default: 20]
        options: An option of a method of your own; may be given again.
        final_options: As `alpha_end`, for any option of a method; may be given again.
        max_repeats: Copies of a sample per epoch, at most (1 to 255).
        min_per_cluster: Least quota of a cluster.  [default: 1 for dbp, else 0]
        class_balance: Raises that to this share of budget / clusters (ssp, dbp).
        pick: Members first: random, hardest, easiest, highest, lowest (score).
        score: Score of the picks highest and lowest.  [default: clip-score]
        dynamic: Draw again in each epoch, or once.
        draw: stream (exact counts) or bernoulli.  [default: stream]
        seed: Decides the draw.
        rates: Method rates: .json {key: rate} or .parquet of rates.
        rate_column: Column of the .parquet of rates.  [default: rate]
        missing_rate: Rate of samples that the file of rates does not name; without it, an error.
        max_rejected: Method rates: refuse if greater shares of its rows and of the samples do not match.  [default: 0.1]
        entries: Method text-balance: a list of entries, balanced as in MetaCLIP.
        per_entry: Method text-balance: t, samples per entry. MetaCLIP: 20000.
        ignore_case: Method text-balance: compare in lower case.
    """

    method: str = ""
    keep: float | None = None
    budget: int | None = None
    per_cluster: int | None = None
    clustering: str | None = None
    without: Sequence[str] = ()
    alpha: float | None = None
    alpha_end: float | None = None
    anneal_epochs: int | None = None
    temperature: float | None = None
    neighbours: int | None = None
    options: Mapping[str, float] = field(default_factory=dict, metadata={OPTION: "option"})
    final_options: Mapping[str, float] = field(default_factory=dict, metadata={OPTION: "final-option"})
    max_repeats: int = 1
    min_per_cluster: int | None = None
    class_balance: float | None = None
    pick: str | None = None
    score: str | ScoreRequest | None = None
    dynamic: bool | None = field(default=None, metadata={OPTION: "dynamic/static"})
    draw: str | None = None
    seed: int = 0
    rates: Path | None = None
    rate_column: str | None = None
    missing_rate: float | None = None
    max_rejected: float | None = None
    entries: Path | None = None
    per_entry: int | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        """Name the method where a file tells it."""
        if not self.method:
            method = "rates" if self.rates is not None else "text-balance" if self.entries is not None else ""
            object.__setattr__(self, "method", method)


def refuse_idle(request: Any, used: Collection[str], why: str) -> None:  # noqa: ANN401  (any request)
    """Refuse fields of a request that were given and would do nothing.

    Args:
        request: a dataclass of this module.
        used: names of the fields that do something.
        why: the others do nothing.

    Raises:
        UserError: another field has another value than its default.
    """
    plain = type(request)()
    for item in fields(request):
        if item.name not in used and getattr(request, item.name) not in (getattr(plain, item.name), []):
            raise UserError(f"`{item.name}` does nothing {why}")
