"""Effect of the rows of a comparison on the samples, computed from their plans before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from tailwise.catalog import Catalog
from tailwise.catalog.clusterings import Clustering
from tailwise.catalog.files import create_array
from tailwise.catalog.removals import Removals
from tailwise.compare.recipe import Truth
from tailwise.compare.statistics import rank_correlation
from tailwise.errors import MAX_REJECTED, UserError
from tailwise.evaluate.metrics import thirds
from tailwise.loader.order import Order
from tailwise.plan.explain import first_epoch
from tailwise.plan.plan import Plan
from tailwise.plan.quotas import UNITS
from tailwise.steps.importing.join import Batch, join_values, read_columns

LEAST_RATIO = 2.0  # of mean rates, tail to head: rows below it hardly differ in what they train on
BATCH_SAMPLES = 1 << 22  # samples that are ranked at once, or those of the largest class
Integers = npt.NDArray[np.int64]
RateOf = Callable[[slice], npt.NDArray[np.float64]]  # rates of rows


class Labels:
    """Class and group of each row of a catalog's newest snapshot; rows without a class in the file, and removed ones, have none.

    Attributes:
        counts: int64 [C], samples of each class.
        names: names of the groups, by falling number of samples: thirds of the classes, or the values of `truth.by`.
        sizes: int64 [G], samples of each group.
    """

    def __init__(self, catalog: Catalog, truth: Truth, work: Path) -> None:
        """Join the file to the rows, in the folder `work`; a UserError says that it cannot be read, or is of another pool."""
        self._classes, known = _codes(catalog, truth, truth.column, work / "classes")
        self.counts = _count(self._classes, len(known))
        if truth.by is None:
            in_order = np.array(sorted(range(len(known)), key=lambda at: known[at].rjust(20)))  # ties by class index
            parts = {name: in_order[some] for name, some in thirds(self.counts[in_order]).items() if len(some)}
            self._groups, self.names = None, [*parts]
            self._group_of = np.zeros(len(known), np.int32)
            for number, members in enumerate(parts.values()):
                self._group_of[members] = number
            self.sizes = np.array([self.counts[members].sum() for members in parts.values()])
        else:
            self._groups, known = _codes(catalog, truth, truth.by, work / "groups")
            sizes = _count(self._groups, len(known))
            order = sorted(range(len(known)), key=lambda at: (-sizes[at], known[at]))
            self.names, self.sizes = [known[at] for at in order], sizes[order]
            self._group_of = np.argsort(order).astype(np.int32)

    def classes(self, rows: slice) -> npt.NDArray[np.int32]:
        """Return the class of rows: int32 [n], −1 for none."""
        return _read(self._classes, rows)

    def groups(self, rows: slice) -> npt.NDArray[np.int32]:
        """Return the group of rows: int32 [n], −1 for none."""
        codes = _read(self._classes if self._groups is None else self._groups, rows)
        return np.where(codes >= 0, self._group_of[codes], -1).astype(np.int32)


def _codes(catalog: Catalog, truth: Truth, column: str, work: Path) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Return the code of each row's value in a column, NaN for none: float32 [N], mapped; and the values by code."""
    path = Path(truth.file).expanduser()
    known: dict[str, int] = {}

    read_columns(path, column, "classes")  # refuses bad ones

    def batches(identifier: str) -> Iterator[Batch]:
        for keys, values in read_columns(path, column, "classes", identifier)[1]:
            texts = (None if value in (None, "") else str(value) for value in values.to_pylist())
            codes = [math.nan if text is None else known.setdefault(text, len(known)) for text in texts]
            yield keys, np.array(codes, np.float64)

    snapshot = catalog.snapshot()
    codes = create_array(work / "codes.npy", (snapshot.rows,), np.float32)
    codes[:] = np.nan
    join_values(catalog, snapshot, path, batches, codes, work / "keys", "class", MAX_REJECTED)
    codes[Removals.of(catalog, snapshot).rows] = np.nan
    if not known:
        raise UserError(f"{truth.file} has no value in column {column!r}: give a column of classes")
    return codes, list(known)


def _read(codes: npt.NDArray[np.float32], rows: slice) -> npt.NDArray[np.int32]:
    return np.nan_to_num(codes[rows], nan=-1).astype(np.int32)


def _count(codes: npt.NDArray[np.float32], values: int) -> Integers:
    counts = np.zeros(values + 1, np.int64)
    for start in range(0, len(codes), BATCH_SAMPLES):
        counts += np.bincount(_read(codes, slice(start, start + BATCH_SAMPLES)) + 1, minlength=values + 1)
    return counts[1:]


@contextmanager
def open_truth(catalog: Catalog, truth: Truth | None) -> Iterator[Labels | None]:
    """Give the labels of a recipe's truth; None without it."""
    with TemporaryDirectory() as folder:
        yield None if truth is None else Labels(catalog, truth, Path(folder))


@dataclass(frozen=True)
class Treatment:
    """Effect of one plan on the samples of the pool."""

    drawn: float  # samples of an epoch, as a share of the pool
    epochs: float  # number of epochs of the training
    mean: float  # how often the training sees a sample of the pool, on average
    sd: float  # standard deviation of that over the samples
    never_seen: float  # share of the pool that it never sees
    rates: Mapping[str, float]  # mean rate (copies an epoch) by group, from head to tail; empty without truth
    ratio: float | None  # rate of the last group to that of the first; None without truth, or with a first rate of 0
    # Spearman's correlation inside classes of a sample's rate with its similarity to its centroid, averaged over classes by their samples;
    # 0 in a class of equal rates; None without truth or centroids
    typicality: float | None


def treatment(order: Order, samples_seen: int, labels: Labels | None) -> Treatment:
    """Return what a training that sees `samples_seen` samples of an order does.

    Stream and ranked draws are exact, except for an incomplete last epoch, and Bernoulli draws: those are expected values.
    Where batches are picked from super-batches, the samples that an epoch trains on are counted; that takes 4 bytes a row of the pool.
    """
    plan = order.plan
    drawn = first_epoch(plan).total / (order.taken // order.options.batch_size)
    epochs = samples_seen / drawn
    if order.picks:
        views = _views(order, samples_seen)
        squares, seen = float((views.astype(np.int64) ** 2).sum()), float(np.count_nonzero(views))
    else:
        views, part = None, epochs % 1
        before, after = _moments(plan, int(epochs)), _moments(plan, int(epochs) + 1)
        squares, seen = ((1 - part) * first + part * then for first, then in zip(before, after, strict=True))

    def rate(rows: slice) -> npt.NDArray[np.float64]:
        return _rate(plan, rows, math.ceil(epochs)) if views is None else views[rows] / epochs

    mean = samples_seen / plan.pool
    sd = math.sqrt(max(squares / plan.pool - mean**2, 0.0))
    rates = {} if labels is None else _mean_rates(plan, labels, rate)
    values = [*rates.values()]
    ratio = values[-1] / values[0] if len(values) > 1 and values[0] else None
    typicality = None if labels is None else _typicality(plan, labels, rate)
    return Treatment(drawn / plan.pool, epochs, mean, sd, 1 - seen / plan.pool, rates, ratio, typicality)


def _views(order: Order, samples_seen: int) -> npt.NDArray[np.int32]:
    """Return how often a training sees each row: int32 [rows]."""
    views = np.zeros(order.plan.rows, np.int32)
    for number in range(samples_seen // order.options.batch_size):
        np.add.at(views, order.batch(number).rows, 1)
    return views


def _moments(plan: Plan, epochs: int) -> tuple[float, float]:
    """Return the sum of squared views over all samples, and the number of samples seen, after whole epochs."""
    if plan.exact:  # copies of two members of a cluster differ by one at most
        drawn = [plan.counts(epoch) for epoch in range(epochs if plan.dynamic else min(epochs, 1))]
        least, more = np.divmod(sum(drawn, np.zeros_like(plan.sizes)), np.maximum(plan.sizes, 1))
        squares = plan.sizes * least**2 + more * (2 * least + 1)
        times = 1 if plan.dynamic else epochs
        return float(squares.sum()) * times**2, float(np.where(least > 0, plan.sizes, more).sum())
    if not plan.by_rate:
        return _expected_moments(plan, plan.cluster_rates, plan.sizes, epochs)
    found = [_expected_moments(plan, partial(plan.rate, span), 1, epochs) for span in plan.spans()]
    return sum(squares for squares, _ in found), sum(seen for _, seen in found)


def _expected_moments(
    plan: Plan, rates_at: Callable[[int], npt.NDArray[np.float64]], members: Integers | int, epochs: int
) -> tuple[float, float]:
    """Return the moments of Bernoulli draws with `members` samples of each rate."""
    mean, variance, unseen = np.zeros(1), np.zeros(1), np.ones(1)
    for epoch in range(epochs if plan.dynamic else min(epochs, 1)):
        rates = rates_at(epoch)
        mean, variance = mean + rates, variance + rates % 1 * (1 - rates % 1)
        unseen = unseen * np.maximum(1 - rates, 0)
    times = 1 if plan.dynamic else epochs
    return float((members * (mean**2 + variance)).sum()) * times**2, float((members * (1 - unseen)).sum())


def _rate(plan: Plan, rows: slice, epochs: int) -> npt.NDArray[np.float64]:
    """Return the rate of rows: float64 [n]; of an annealed plan its mean over the epochs."""
    if not plan.annealed:
        return plan.rate(rows)
    return sum((plan.rate(rows, epoch) for epoch in range(epochs)), np.zeros(1)) / epochs


def _mean_rates(plan: Plan, labels: Labels, rate: RateOf) -> dict[str, float]:
    """Return the mean rate of each group; its sum is exact."""
    sums = np.zeros(len(labels.names), np.int64)
    for rows in plan.spans():
        groups, rates = labels.groups(rows), rate(rows)
        np.add.at(sums, groups[groups >= 0], np.rint(rates[groups >= 0] * UNITS).astype(np.int64))
    means = sums / UNITS / np.maximum(labels.sizes, 1)
    return dict(zip(labels.names, means.tolist(), strict=True))


def _centroids_of(plan: Plan) -> Clustering | None:
    """Return the clustering with centroids that a plan rests on, or main; None if there is none of the plan's snapshot."""
    names = [plan.clustering, "main"]
    while of := plan.config.get("of"):
        plan = Plan(plan.catalog, of)
        names.insert(-1, plan.clustering)
    found = (Clustering.find(plan.catalog, name) for name in names)
    return next((item for item in found if item and item.has_centroids and item.snapshot.id == plan.snapshot.id), None)


def _typicality(plan: Plan, labels: Labels, rate: RateOf) -> float | None:
    """Return `Treatment.typicality`; of samples with a class and a cluster."""
    clustering = _centroids_of(plan)
    if clustering is None:
        return None
    batch_of = (np.cumsum(labels.counts) - labels.counts) // BATCH_SAMPLES
    total, weight = 0.0, 0
    for batch in np.unique(batch_of):
        found = []
        for part in plan.catalog.parts(plan.snapshot):
            classes = labels.classes(part.span)
            inside = (classes >= 0) & (clustering.labels.read(part) >= 0) & (batch_of[classes] == batch)
            figures = classes, rate(part.span), clustering.similarities.read(part)
            found.append([each[inside] for each in figures])
        correlations, sizes = rank_correlation(*map(np.concatenate, zip(*found, strict=True)))
        total, weight = total + float((correlations * sizes).sum()), weight + int(sizes.sum())
    return total / weight if weight else None


def gate_table(rows: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """Return the columns and the cells, as text, of a table of treatments; `rows` are those of the gate."""
    names = [*next((row["rates"] for row in rows if row["rates"]), {})]
    columns = [
        *("row", "drawn an epoch", "epochs", "views of a sample", "never seen", "samples seen"),
        *(f"cost ({baseline}: 100 %)", *(f"rate, {name}" for name in names)),
        *([f"rate, {names[-1]} / {names[0]}", "rate ~ typicality"] if names else []),
    ]
    cells = []
    for row in rows:
        texts = [f"{row['drawn']:.1%}", f"{row['epochs']:.2f}", f"{row['mean']:.2f} ± {row['sd']:.2f}"]
        texts += [f"{row['never_seen']:.1%}", f"{row['samples_seen']:,}", f"{row['cost']:.0%}"]
        texts += [f"{rate:.3f}" for rate in row["rates"].values()]
        last = (("ratio", ".2f"), ("typicality", "+.2f")) if names else ()
        texts += ["–" if row[name] is None else f"{row[name]:{form}}" for name, form in last]
        cells.append([row["row"], *(text.replace("%", " %") for text in texts)])
    return {"columns": columns, "cells": cells}


def gate_lines(gate: Mapping[str, Any]) -> list[str]:
    """Return a line for each row, and one for each note."""
    heads = gate["columns"][1:]
    lines = [f"{row}: {', '.join(map(' '.join, zip(heads, cells, strict=True)))}" for row, *cells in gate["cells"]]
    return [*lines, *gate["notes"]]


def check_gate(gate: Mapping[str, Any]) -> None:
    """Refuse rows that hardly differ in what they train on: a UserError, if the greatest ratio of all rows is below LEAST_RATIO."""
    if gate["most_ratio"] is not None and gate["most_ratio"] < LEAST_RATIO:
        raise UserError(
            f"the greatest ratio of mean rates, tail to head, is {gate['most_ratio']:.2f}: below {LEAST_RATIO:g}, all rows train on "
            "nearly the same; change method, clusters or keep, or train all the same with `force`"
        )
