"""Accuracies of classes, groups and bins of training frequency, recall in retrieval, and intervals of both.

Letters: n images, C classes, B replicates, K values of k, D different rows.

A bootstrap over images draws n of the n images with replacement. The figures depend only on the class and the outcome of each image, so
the numbers of drawn images in all (class, outcome) cells are drawn at once: they are multinomial. That is the same distribution, at a
cost that depends on the number of cells, not of images.

Where all replicates are equal, for example at 0 right of 20, the bootstrap has no width. The interval is then Wilson's score interval of
the value (JASA 22, 1927), with Kish's effective number of images: 1 / Σ w² over images of weight w in the figure, Σ w = 1 (Survey
Sampling, 1965; Korn and Graubard, Survey Methodology 24, 1998, use it so). It is n for an accuracy over images, and C² / Σ_c (1 / n_c) for
a mean over the C classes that have images: n for classes of equal size, less otherwise. In recall, an image weighs as much as its texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Figures: TypeAlias = dict[str, Floats]
Interval: TypeAlias = dict[str, float | None]

GROUPS = ("head", "medium", "few")
LEVEL = 0.95
TOP = 5
_CHUNK_CELLS = 1 << 21  # of replicates at a time: bounds memory to about 50 MB


def tally(labels: Ints, guesses: Ints, classes: int) -> Ints:
    """Return int64 [C, 3]: images of each class whose class came first, second to fifth, or later.

    `labels` [n] are the classes of the images, `guesses` [n, TOP or C if that is less] the classes of highest score, best first.
    """
    first = guesses[:, 0] == labels
    outcome = np.where(first, 0, np.where((guesses == labels[:, None]).any(axis=1), 1, 2))
    return np.bincount(labels * 3 + outcome, minlength=classes * 3).astype(np.int64).reshape(classes, 3)


def classification(
    cells: Ints,
    members: Mapping[str, Ints],
    frequencies: Ints | None = None,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return value, low and high of "top1", "top5", "mean_per_class", and the mean per class of each group.

    `cells` are those of `tally`, `members` the classes of each group by its name; a group may be empty. With the training `frequencies`
    [C] of the classes, also "slope" and "correlation" (see `trend`). All figures are None where there is no image. `replicates` and
    `seed` are those of the bootstrap.
    """

    def figures(counts: Ints) -> Figures:
        images, right = counts.sum(axis=-1), counts[..., 0]
        total = images.sum(axis=-1)
        rates = _ratio(right, images)
        means = {name: _mean(rates[..., classes]) for name, classes in members.items()}
        found = counts[..., :2].sum(axis=(-1, -2))
        top = {"top1": _ratio(right.sum(axis=-1), total), "top5": _ratio(found, total)}
        return {
            **top,
            "mean_per_class": _mean(rates),
            **means,
            **({} if frequencies is None else trend(rates, frequencies)),
        }

    images = cells.sum(axis=-1)
    means = {"mean_per_class": images, **{name: images[classes] for name, classes in members.items()}}
    sizes = {"top1": images.sum(), "top5": images.sum(), **{name: _effective(own) for name, own in means.items()}}
    return intervals(cells, figures, sizes, replicates=replicates, seed=seed)


def trend(rates: Floats, counts: Ints) -> Figures:
    """Return slope and correlation (Pearson's) of the accuracy of classes on the logarithm of their training frequency.

    The slope is the accuracy gained with each doubling of the frequency, by least squares over classes of equal weight. As in Udandarao et
    al. (NeurIPS 2024, arXiv 2404.04125), a class that was never seen counts as seen once. `rates` are accuracies [..., C], NaN for
    classes without images, which are left out; `counts` are [C]. A figure is NaN where accuracies or frequencies do not differ.
    """
    there = ~np.isnan(rates)
    doublings_seen = np.log2(np.maximum(counts, 1).astype(np.float64))
    x = np.where(there, doublings_seen - _mean(np.where(there, doublings_seen, np.nan))[..., None], 0.0)
    y = np.where(there, rates - _mean(rates)[..., None], 0.0)
    xx, yy, xy = (np.einsum("...c,...c->...", *pair) for pair in ((x, x), (y, y), (x, y)))
    flat = np.isclose(xx, 0) | np.isclose(yy, 0)
    return {
        "slope": _ratio(xy, np.where(np.isclose(xx, 0), 0, xx)),
        "correlation": _ratio(xy, np.where(flat, 0, np.sqrt(xx * yy))),
    }


def _effective(images: Ints) -> float:
    """Return the effective number of images of a mean over the classes that have `images` [C] (see the module)."""
    there = images[images > 0]
    return float(len(there) ** 2 / (1 / there).sum()) if len(there) else 0.0


def recall(
    found_texts: npt.NDArray[np.bool_],  # [n, K], True if one of the image's texts is among its k nearest texts
    found_images: Ints,  # [n, K], number of the image's texts that have it among their k nearest images
    texts: Ints,  # [n], number of the image's texts
    ks: Sequence[int],  # the K values of k
    *,
    replicates: int,  # B
    seed: int,  # of the draws
) -> dict[str, Interval]:
    """Return value, low and high of "text_retrieval@k", "image_retrieval@k" and "mean_recall@k", the mean of both, for the K values of k.

    The bootstrap is over images with their texts.
    """
    rows = np.column_stack([texts, found_texts.astype(np.int64), found_images])
    different, counts = np.unique(rows, axis=0, return_counts=True)

    def figures(drawn: Ints) -> Figures:
        found: Figures = {}
        for at, k in enumerate(ks):
            to_text = _ratio(drawn @ different[:, 1 + at], drawn.sum(axis=-1))
            to_image = _ratio(drawn @ different[:, 1 + len(ks) + at], drawn @ different[:, 0])
            found |= {f"text_retrieval@{k}": to_text, f"image_retrieval@{k}": to_image}
            found[f"mean_recall@{k}"] = (to_text + to_image) / 2
        return found

    of_texts, of_images = np.full(len(counts), 1 / len(rows)), different[:, 0] / texts.sum()
    weights = {"text_retrieval": of_texts, "image_retrieval": of_images, "mean_recall": (of_texts + of_images) / 2}
    sizes = {f"{name}@{k}": float(1 / (counts @ weight**2)) for name, weight in weights.items() for k in ks}
    return intervals(counts.astype(np.int64), figures, sizes, replicates=replicates, seed=seed)


def macro_f1(labels: Ints, guesses: Ints, groups: Ints, *, replicates: int, seed: int) -> Interval:  # noqa: ARG001
    """Return value, low and high of the mean F1 of the classes that have images (WILDS, arXiv 2012.07421: iWildCam)."""
    pairs, counts = np.unique(np.column_stack([labels, guesses[:, 0]]), axis=0, return_counts=True)
    same, size = pairs[:, 0] == pairs[:, 1], int(pairs.max()) + 1

    def figures(drawn: Ints) -> Figures:
        images, guessed = (_sums(drawn, pairs[:, at], size) for at in (0, 1))
        return {
            "f1": _mean(_ratio(2 * _sums(drawn * same, pairs[:, 0], size), np.where(images > 0, images + guessed, 0)))
        }

    return intervals(counts.astype(np.int64), figures, {"f1": len(labels)}, replicates=replicates, seed=seed)["f1"]


def worst_group(top: int) -> Callable[..., Interval]:
    """Return a function of labels [n], guesses [n, TOP] and groups [n]: the accuracy of the `top` guesses in the worst group.

    WILDS (arXiv 2012.07421): FMoW; DataComp: Dollar Street, GeoDE. Images of a negative group are left out.
    """

    def measure(labels: Ints, guesses: Ints, groups: Ints, *, replicates: int, seed: int) -> Interval:
        right = (guesses[:, :top] == labels[:, None]).any(axis=1)[groups >= 0]
        pairs, counts = np.unique(np.column_stack([groups[groups >= 0], right]), axis=0, return_counts=True)
        if not len(pairs):
            return {"value": None, "low": None, "high": None}
        size = int(pairs[:, 0].max()) + 1

        def rates(drawn: Ints) -> Floats:
            return _ratio(_sums(drawn * pairs[:, 1], pairs[:, 0], size), _sums(drawn, pairs[:, 0], size))

        of_group = _sums(counts, pairs[:, 0], size)[np.nanargmin(rates(counts))]
        figures = lambda drawn: {"worst": np.fmin.reduce(rates(drawn), axis=-1)}  # noqa: E731
        sizes = {"worst": float(of_group)}
        return intervals(counts.astype(np.int64), figures, sizes, replicates=replicates, seed=seed)["worst"]

    return measure


def _sums(drawn: Ints, kinds: Ints, size: int) -> Ints:
    """Return sums of counts [..., P] by the kind [P] of each, in [0, size): int64 [..., size]."""
    order = np.argsort(kinds, kind="stable")
    found, starts = np.unique(kinds[order], return_index=True)
    sums = np.zeros((*drawn.shape[:-1], size), np.int64)
    sums[..., found] = np.add.reduceat(drawn[..., order], starts, axis=-1)
    return sums


# Official metrics that need more than the outcomes by class: functions of labels [n], guesses [n, TOP] and groups [n].
OF_GUESSES: Mapping[str, Callable[..., Interval]] = {
    "macro_f1": macro_f1,
    "worst_group_top1": worst_group(1),
    "worst_group_top5": worst_group(TOP),
}


def intervals(
    cells: Ints, figures: Callable[[Ints], Figures], sizes: Mapping[str, float], *, replicates: int, seed: int
) -> dict[str, Interval]:
    """Return value, low and high of figures of counts, with intervals of level LEVEL: percentile bootstrap, else Wilson's (see the module).

    `cells` are numbers of images of each kind, of any shape. `figures` maps counts [..., *shape of cells] to arrays [...], NaN where there
    is no figure; replicates without the figure are left out. Low and high are the lowest and highest replicate within the level; if these
    are equal, the ends of Wilson's interval with the effective number of images in `sizes`, for figures that are shares and so are there;
    None for others.
    """
    values = figures(cells)
    chunks = [figures(drawn) for drawn in _resample(cells, replicates, seed)]
    return {
        name: _interval(value, np.concatenate([chunk[name] for chunk in chunks]), sizes.get(name))
        for name, value in values.items()
    }


def _resample(cells: Ints, replicates: int, seed: int) -> Iterator[Ints]:
    """Yield counts of B bootstrap samples, in chunks [b, *shape of cells]; the size of the chunks changes nothing."""
    flat = cells.reshape(-1)
    full = np.flatnonzero(flat)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    step = max(1, _CHUNK_CELLS // max(1, flat.size))
    for first in range(0, replicates, step):
        drawn = np.zeros((min(step, replicates - first), flat.size), np.int64)
        if len(full):
            drawn[:, full] = generator.multinomial(flat.sum(), flat[full] / flat.sum(), size=len(drawn))
        yield drawn.reshape(-1, *cells.shape)


def _interval(value: Floats, drawn: Floats, size: float | None) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if np.isnan(value) or not len(known):
        return {"value": None, "low": None, "high": None}
    tail = (1 - LEVEL) / 2
    # Replicates, not points between two of them: if all are equal, so are both ends.
    low, high = float(np.quantile(known, tail, method="lower")), float(np.quantile(known, 1 - tail, method="higher"))
    ends: tuple[float | None, float | None] = low, high
    if low == high:
        ends = (None, None) if size is None else _wilson(float(value), size)
    return {"value": float(value), "low": ends[0], "high": ends[1]}


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Return the ends of Wilson's score interval of a share of n > 0 images; the share is inside."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    shares: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return shares


def _mean(rates: Floats) -> Floats:
    """Return the mean of the known rates over the last axis."""
    there = ~np.isnan(rates)
    return _ratio(np.where(there, rates, 0).sum(axis=-1), there.sum(axis=-1))


def thirds(counts: Ints) -> dict[str, Ints]:
    """Return the classes in three GROUPS of equal number (to within one), by descending training frequency; ties by class index.

    `counts` [C] are the training samples of each class; the classes of a group are ascending.
    """
    order = np.argsort(-counts, kind="stable")
    return {name: np.sort(part) for name, part in zip(GROUPS, np.array_split(order, len(GROUPS)), strict=True)}


def bounded(counts: Ints, upper: int, lower: int) -> dict[str, Ints]:
    """Return the classes with more than `upper` training samples, with `lower` to `upper`, and with fewer, by GROUPS (Liu et al. 2019).

    The paper has 100 and 20. `counts` is [C]; the classes of a group are ascending. A group may be empty.
    """
    parts = (counts > upper, (counts >= lower) & (counts <= upper), counts < lower)
    return {name: np.flatnonzero(part) for name, part in zip(GROUPS, parts, strict=True)}


def doublings(counts: Ints) -> list[tuple[int, int, Ints]]:
    """Return bins of classes by powers of two of their training frequency `counts` [C]: 0, 1, 2 … 3, 4 … 7, ….

    Each non-empty bin is its least and greatest frequency and its classes, ascending.
    """
    exponents = np.frexp(counts.astype(np.float64))[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, …
    bins = []
    for exponent in np.unique(exponents).tolist():
        least, greatest = (1 << exponent - 1, (1 << exponent) - 1) if exponent else (0, 0)
        bins.append((least, greatest, np.flatnonzero(exponents == exponent)))
    return bins
