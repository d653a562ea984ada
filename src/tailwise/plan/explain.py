"""The figures of a plan, before anything is drawn, and their plots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.outputs import is_png, is_text, writing_output
from tailwise.errors import UserError
from tailwise.extras import STYLE, encode, require
from tailwise.notebook import BLUE, GREY
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNIT_BITS, UNITS
from tailwise.text import plain

BIN_NAMES = ("head", "upper", "middle", "lower", "tail")
RATE_NAMES = ("highest", "high", "middle", "low", "lowest")
POOL, DRAWN, WORDS = GREY, BLUE, "#66707a"
POINTS = 400  # of a curve; more clusters are shown as means of neighbours by size
RATE_BINS = 1 << 16
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EpochFigures:
    """Figures of one epoch; exact for stream and ranked draws, expected values for Bernoulli."""

    epoch: int  # 0, 1, …
    total: float  # samples drawn, with repeats
    unique: float  # distinct samples drawn
    repeated: float  # total − unique
    covered: float  # distinct samples drawn in this epoch or an earlier one


@dataclass(frozen=True)
class Bin:
    """Clusters of similar size; in a plan of groups of about equal rates, groups of similar rates."""

    name: str  # from "head" (the largest fifth of the clusters) to "tail"; or from "highest" (a fifth of the samples) to "lowest"
    clusters: int  # number of clusters or groups
    largest: int  # size of the largest
    smallest: int  # size of the smallest
    samples: int  # number of members
    drawn: float  # sum of the quotas, per epoch
    rate: float  # drawn / samples: copies of a member per epoch


@dataclass(frozen=True)
class Passes:
    """How often a training sees the samples that a plan keeps. A sample is worth less with each pass (Goyal et al., CVPR 2024).

    Attributes:
        samples_seen: samples of the training, with repeats.
        epochs: epochs of the plan that these are.
        kept: samples that some epoch holds; of a static plan, those of its one subset.
        mean: samples_seen / kept.
        bins: passes over a sample of each bin (see Explanation), on average; empty for static plans, whose kept samples are
            seen alike, and for those with a rate per row.
        seen: samples seen at least once; expected where the draw is random, and for the last epoch if it is incomplete.
    """

    samples_seen: int
    epochs: float
    kept: int
    mean: float
    bins: dict[str, float]
    seen: float


@dataclass(frozen=True)
class Explanation:
    """The figures of a plan.

    Attributes:
        name: name of the plan.
        config: configuration of the plan.
        rows: samples of the snapshot.
        pool: samples that were not removed when the plan was made.
        eligible: samples that the plan may draw.
        asked: budget that was asked for, in samples; None for a plan of given rates. Plans with `above_one` "truncate" draw less.
        exact: True if the epochs' sizes are exact; else they are expected values.
        epochs: one entry per epoch asked for.
        bins: figures by cluster size, or by rate; empty for a plan with a rate per row.
        capped_clusters: number of clusters whose quota is their maximum.
        capped_share: share of the budget that these clusters take.
        same: True if all epochs are the same.
    """

    name: str
    config: dict[str, Any]
    rows: int
    pool: int
    eligible: int
    asked: int | None
    exact: bool
    epochs: list[EpochFigures]
    bins: list[Bin]
    capped_clusters: int
    capped_share: float
    same: bool

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return asdict(self)


def explain(plan: Plan, epochs: int = 10) -> Explanation:
    """Return the figures of a plan over its first `epochs` epochs."""
    if plan.by_rate or plan.incomplete:
        figures, bins, capped = _rate_epochs(plan, epochs), [], (0, 0.0)
    else:
        figures, bins, capped = _cluster_epochs(plan, epochs), _bins(plan), _capped(plan)
    config, eligible = dict(plan.config), int(plan.summary["eligible"])
    about = plan.name, config, plan.rows, plan.pool, eligible, config.get("budget"), plan.sizes_known
    return Explanation(*about, figures, bins, *capped, same=not plan.changes)


def passes(plan: Plan, samples_seen: int) -> Passes:
    """Return how often a training that goes through a plan's epochs in order sees each kept sample.

    Raises:
        UserError: the training has more epochs than a plan.
    """
    first = first_epoch(plan)
    whole, rest = divmod(samples_seen, first.total)
    part, epochs = rest / first.total, samples_seen / first.total
    count = int(whole) + (part > 0)
    plan.drawn_epoch(count - 1)  # refuses too many epochs
    covered = [0.0, *(each.covered for each in explain(plan, count).epochs)]
    seen = (1 - part) * covered[int(whole)] + part * covered[-1]
    if not plan.dynamic:
        kept = round(first.unique)
    elif plan.by_rate:
        kept = int(plan.summary["eligible"])
    else:
        kept = int(plan.sizes[plan.reachable].sum())
    views = (
        {}
        if plan.by_rate or not plan.dynamic
        else {name: _views(plan, members, epochs) for name, members in _binned(plan)}
    )
    return Passes(samples_seen, epochs, kept, samples_seen / kept, views, seen)


def _views(plan: Plan, members: npt.NDArray[np.int64], epochs: float) -> float:
    """Return how often a sample of some clusters is seen in some epochs, on average."""
    whole, part = int(epochs), epochs % 1
    quotas = sum((float(plan.quotas_at(epoch)[members].sum()) for epoch in range(whole if plan.annealed else 0)), 0.0)
    last = float(plan.quotas_at(whole)[members].sum()) * (part if plan.annealed else epochs)
    return (quotas + last) / UNITS / int(plan.sizes[members].sum())


def first_epoch(plan: Plan) -> EpochFigures:
    """Return the figures of epoch 0; all epochs have the same, unless the plan is annealed."""
    return (_rate_epochs if plan.by_rate or plan.incomplete else _cluster_epochs)(plan, 1)[0]


def _cluster_epochs(plan: Plan, epochs: int) -> list[EpochFigures]:
    if not plan.exact:
        unseen = np.ones(len(plan.sizes))
        return [_expected(plan.cluster_rates(epoch), plan.sizes, unseen, epoch, plan) for epoch in range(epochs)]
    figures = []
    taken = np.zeros_like(plan.sizes)
    for epoch in range(epochs):
        counts = plan.counts(epoch)
        taken = taken + counts if plan.dynamic or epoch == 0 else taken
        # Copies of two members differ by at most one, so no member repeats before all n are drawn.
        unique, covered = int(np.minimum(counts, plan.sizes).sum()), int(np.minimum(taken, plan.sizes).sum())
        total = int(counts.sum())
        figures.append(EpochFigures(epoch, total, unique, total - unique, covered))
    return figures


def exposures(plan: Plan, epochs: int) -> npt.NDArray[np.float64]:
    """Return how often a member of each cluster is drawn in the first `epochs` epochs, on average: float64 [K].

    Exact for stream and ranked draws, expected values for Bernoulli.
    """
    per_epoch = plan.counts if plan.exact else plan.cluster_rates
    total = sum((np.asarray(per_epoch(plan.drawn_epoch(epoch)), np.float64) for epoch in range(epochs)), np.zeros(1))
    return total / np.maximum(plan.sizes, 1) if plan.exact else total


def _expected(
    rates: npt.NDArray[np.float64],
    members: npt.NDArray[np.int64],
    unseen: npt.NDArray[np.float64],
    epoch: int,
    plan: Plan,
) -> EpochFigures:
    """Return expected values of a Bernoulli draw with `members` samples of each rate; lower `unseen`, the chance of no draw so far."""
    total = float((rates * members).sum())
    once = np.minimum(rates, 1.0)
    unique = float((once * members).sum())
    if plan.dynamic or epoch == 0:
        unseen *= 1 - once
    return EpochFigures(epoch, total, unique, total - unique, float(((1 - unseen) * members).sum()))


def _rate_epochs(plan: Plan, epochs: int) -> list[EpochFigures]:
    sums = np.zeros((epochs, 4))
    for span in plan.spans():
        rates = plan.rate(span)
        ones, unseen = np.ones(len(rates), np.int64), np.ones(len(rates))
        for epoch in range(epochs):
            part = _expected(rates, ones, unseen, epoch, plan)
            sums[epoch] += (part.total, part.unique, part.repeated, part.covered)
    return [EpochFigures(epoch, *map(float, row)) for epoch, row in enumerate(sums)]


def _binned(plan: Plan) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Return name and clusters of each bin."""
    order = np.argsort(-plan.sizes if plan.has_clusters else -plan.cluster_rates(), kind="stable")
    order = order[plan.sizes[order] > 0]
    names = ("all",) if len(order) < len(BIN_NAMES) else BIN_NAMES if plan.has_clusters else RATE_NAMES
    found = zip(names, _fifths(plan, order, len(names)), strict=True)
    return [
        (name, members) for name, members in found if len(members)
    ]  # one group may hold several fifths of the samples


def _bins(plan: Plan) -> list[Bin]:
    bins = []
    for name, members in _binned(plan):
        samples, drawn = int(plan.sizes[members].sum()), float(plan.quotas[members].sum() / UNITS)
        sizes = plan.sizes[members]
        bins.append(Bin(name, len(members), int(sizes.max()), int(sizes.min()), samples, drawn, drawn / samples))
    return bins


def _fifths(plan: Plan, order: npt.NDArray[np.int64], count: int) -> list[npt.NDArray[np.int64]]:
    """Split clusters into runs of equal number; or groups of equal rates into runs of about equally many samples."""
    if plan.has_clusters:
        return np.array_split(order, count)
    before = np.cumsum(plan.sizes[order]) - plan.sizes[order]
    return np.split(order, np.searchsorted(before, plan.sizes.sum() * np.arange(1, count) / count))


def _capped(plan: Plan) -> tuple[int, float]:
    capped = (plan.sizes > 0) & (plan.quotas >> UNIT_BITS >= plan.sizes * int(plan.config["max_repeats"]))
    return int(capped.sum()), float(plan.quotas[capped].sum() / plan.quotas.sum())


def cluster_list(plan: Plan) -> list[dict[str, Any]]:
    """Return cluster, size, quota (samples per epoch) and rate (copies of a member per epoch) of every cluster.

    In a grouping by a column, each also has the column's value. Raise a UserError if the plan has a rate per sample.
    """
    if not plan.has_clusters:
        raise UserError(
            f"plan {plan.name!r} carries a rate per sample and has no clusters to list: use a plan by clusters"
        )
    quotas = (plan.quotas / UNITS).tolist()
    columns = zip(range(len(quotas)), plan.sizes.tolist(), quotas, plan.cluster_rates().tolist(), strict=True)
    listed = [{"cluster": at, "size": size, "quota": quota, "rate": rate} for at, size, quota, rate in columns]
    clustering = Clustering.find(plan.catalog, plan.clustering)
    if clustering is None or clustering.values is None:
        return listed
    values = [
        *clustering.values,
        *[None] * (len(listed) - len(clustering.values)),
    ]  # a plan may have one more, for no group
    return [{**item, "value": value} for item, value in zip(listed, values, strict=True)]


def write_plot(plan: Plan, epochs: int, path: Path, *, png: bool = False, overwrite: bool = False) -> None:
    """Write the plot of a plan as SVG and, if `png`, as PNG beside it. See `plot_plan` and `writing_output`."""
    if path.suffix.lower() == ".png":
        raise UserError(f"plot {path}: name the SVG file; `png` writes a PNG file beside it")
    for suffix, content in plot_plan(plan, epochs, png=png).items():
        target, is_ours = (path, is_text("<?xml")) if suffix == ".svg" else (path.with_suffix(suffix), is_png)
        with writing_output(target, plan.catalog, overwrite=overwrite, is_ours=is_ours) as temporary:
            temporary.write_bytes(content)


def plot_plan(plan: Plan, epochs: int, *, png: bool = False) -> dict[str, bytes]:
    """Return the plot of a plan over its first epochs, as `encode` does; the same bytes for the same plan and versions.

    A plan by rate has no panel of clusters: its samples are shown from the highest to the lowest rate.
    """
    require("train", "matplotlib", purpose="`plot`")
    import matplotlib as mpl  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = explain(plan, epochs).epochs
    style = STYLE | {"svg.fonttype": "path", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(8 if plan.by_rate else 11, 2.8))
        figure.set_layout_engine("constrained", wspace=0.05)
        *sizes, seen, coverage = figure.subplots(1, 2 if plan.by_rate else 3)
        if plan.by_rate:
            places, views = _by_rate(plan, epochs)
            seen.set(xlabel="% of the pool, from the highest rate to the lowest")
        else:
            order = np.argsort(-plan.sizes, kind="stable")
            order = order[plan.sizes[order] > 0]
            places = _means(np.arange(1, len(order) + 1))
            if len(order) == 1:  # lines have two ends
                order, places = np.repeat(order, 2), np.array([0.5, 1.5])
            members = _means(plan.sizes[order])
            _plot_sizes(sizes[0], places, members, _means(plan.quotas[order] / UNITS))
            views = _means((plan.sizes * exposures(plan, epochs))[order]) / members
            seen.set(xlabel="clusters, from the largest to the smallest")
        drawn = sum(each.total for each in (shown if plan.dynamic else shown[:1] * epochs))
        _plot_views(seen, places, views, drawn / (plan.rows if plan.by_rate else int(plan.sizes.sum())), epochs)
        covered = [100 * each.covered / max(plan.pool, 1) for each in shown]
        coverage.plot(range(1, epochs + 1), covered, color=DRAWN, marker="o", markersize=3)
        budget = 100 * shown[0].total / max(plan.pool, 1)
        coverage.axhline(budget, color=POOL, zorder=0)
        coverage.text(epochs + 0.3, budget - 2, "budget of an epoch", ha="right", va="top", color=WORDS)
        coverage.set(ylim=(0, max(102, 1.05 * budget)), xlabel="epochs", ylabel="% of the pool shown")
        (sizes or [seen])[0].set_title(plain(f"plan {plan.name}: {plan.config['method']}"), loc="left")
        return encode(figure, png=png)


def _plot_sizes(axes: Any, places: Values, sizes: Values, quotas: Values) -> None:  # noqa: ANN401
    for values, color, alpha, label in ((sizes, POOL, 1, "in the pool"), (quotas, DRAWN, 0.85, "in one epoch")):
        axes.fill_between(places, values, 0.5, step="mid", color=color, alpha=alpha, label=label, linewidth=0)
    axes.set(yscale="log", ylim=(0.5, None), xlim=(places[0] - 0.5, places[-1] + 0.5))
    axes.set(xlabel="clusters, from the largest to the smallest", ylabel="samples")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)


def _plot_views(axes: Any, places: Values, views: Values, mean: float, epochs: int) -> None:  # noqa: ANN401
    axes.plot(places, views, color=DRAWN, drawstyle="steps-mid")
    axes.axhline(mean, color=POOL, zorder=0)
    axes.text(1, mean, "mean", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=WORDS)
    axes.set(xlim=places[[0, -1]], ylim=(0, 1.1 * max(views.max(), mean)), ylabel=f"times seen in {epochs} epochs")


def _means(values: npt.NDArray[Any]) -> Values:
    """Return the means of at most POINTS runs of neighbours."""
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])


def _by_rate(plan: Plan, epochs: int) -> tuple[Values, Values]:
    """Return a curve of the samples by falling rate: the share of the pool in %, and how often such a sample is seen, expected."""
    most = max(float(plan.rate(span).max(initial=0)) for span in plan.spans()) or 1.0
    counts = np.zeros(RATE_BINS + 1, np.int64)
    for span in plan.spans():
        places = np.rint(plan.rate(span) / most * RATE_BINS).astype(np.int64)
        counts += np.bincount(places, minlength=RATE_BINS + 1)
    found = np.flatnonzero(counts)[::-1]
    ends = np.cumsum(counts[found])
    at = np.linspace(0, plan.rows - 1, POINTS)
    chosen = found[np.searchsorted(ends, at, side="right")]
    return 100 * at / max(plan.rows - 1, 1), chosen.astype(np.float64) * (most / RATE_BINS * epochs)
