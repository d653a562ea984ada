"""The table of methods: weight → quota → pick → draw. A new method is one line in the table, or a registered function."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError
from tailwise.kernels.centroids import NEIGHBOURS, neighbour_distance
from tailwise.text import did_you_mean

Fill = Literal["scale", "shift"]
Weight = TypeVar("Weight", bound=Callable[..., npt.NDArray[np.float64]])


@dataclass(frozen=True)
class Clusters:
    """The non-empty clusters of a pool, as a weight function gets them.

    Attributes:
        size: n_j, int64 [K], ≥ 1.
        d_intra: mean cosine distance of members to their centroid, float64 [K]; NaN in groupings without centroids.
        d_inter: mean cosine distance to the 20 nearest other centroids, float64 [K]; NaN in groupings without centroids.
        centroids: returns the centroids, float32 [K, d], unit norm; None in groupings without centroids.
        density: samples within one radius of each centroid, int64 [K]; None where `tailwise cluster` did not count them.
        shares: asked share of an epoch, float64 [K]; None without a mixture.
    """

    size: npt.NDArray[np.int64]
    d_intra: npt.NDArray[np.float64]
    d_inter: npt.NDArray[np.float64]
    centroids: Callable[[], npt.NDArray[np.float32]] | None = None
    density: npt.NDArray[np.int64] | None = None
    shares: npt.NDArray[np.float64] | None = None

    def distance_to_nearest(self, neighbours: int) -> npt.NDArray[np.float64]:
        """Return d_inter for another number of neighbours: float64 [K]."""
        if neighbours == NEIGHBOURS or self.centroids is None:
            return self.d_inter
        return neighbour_distance(self.centroids(), neighbours)


def power(clusters: Clusters, *, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j^α (DynamiCS, section 3.2): α = 0 is flat, α = 1 proportional."""
    weights: npt.NDArray[np.float64] = clusters.size.astype(np.float64) ** alpha
    return weights


def soft_cap(clusters: Clusters, *, threshold: float, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j up to the threshold t, and t · (n_j / t)^α above; t is the mean size if `threshold` is 0."""
    size = clusters.size.astype(np.float64)
    limit = threshold or float(size.mean())
    weights: npt.NDArray[np.float64] = np.where(size > limit, limit * (size / limit) ** alpha, size)
    return weights


def by_density(clusters: Clusters, *, alpha: float) -> npt.NDArray[np.float64]:
    """Return n_j · ρ_j^(α − 1), where ρ is the density.

    A member's rate is in proportion to ρ^(α − 1); in DynamiCS it is n^(α − 1). K-means makes sizes nearly equal, but not densities. Raise a
    UserError if the clusters have no density.
    """
    if clusters.density is None:
        raise UserError("this grouping has no density: make a clustering with `density` auto, or use `method` dynamics")
    density = np.maximum(clusters.density, 1).astype(np.float64)
    weights: npt.NDArray[np.float64] = clusters.size * density ** (alpha - 1)
    return weights


def by_shares(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the asked shares of a mixture."""
    assert clusters.shares is not None
    return clusters.shares


def flat(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the same weight for every cluster."""
    return power(clusters, alpha=0.0)


def proportional(clusters: Clusters) -> npt.NDArray[np.float64]:
    """Return the clusters' sizes."""
    return power(clusters, alpha=1.0)


def complexity(clusters: Clusters, *, temperature: float, neighbours: float = NEIGHBOURS) -> npt.NDArray[np.float64]:
    """Return softmax(d_intra · d_inter / τ) (DBP, section 3.2). Raise a UserError if the clusters have no distances."""
    if np.isnan(clusters.d_intra).any():
        remedy = "use a clustering of `tailwise cluster`, or another method"
        raise UserError(f"this grouping has no centroids, and so no distances: {remedy}")
    logits = clusters.d_intra * clusters.distance_to_nearest(int(neighbours)) / temperature
    weights: npt.NDArray[np.float64] = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


@dataclass(frozen=True)
class Pick:
    """An order of the members of a cluster."""

    summary: str  # description for users
    # what orders them: nothing (pseudo-random), "similarity" to the centroid, or a "score"
    by: Literal["similarity", "score"] | None = None
    sign: int = 1  # +1 ascending, −1 descending


PICKS: Mapping[str, Pick] = MappingProxyType(
    {
        "random": Pick("pseudo-random"),
        "hardest": Pick("farthest from the centroid", "similarity"),
        "easiest": Pick("nearest to the centroid", "similarity", -1),
        "highest": Pick("highest score", "score", -1),
        "lowest": Pick("lowest score", "score"),
    }
)


@dataclass(frozen=True)
class Method:
    """A rule for how much of each cluster to draw, and which members first.

    Attributes:
        summary: one line for users.
        source: paper and section.
        weight: (clusters, **options) → float64 [K], > 0.
        fill: how weights meet the budget: "scale", q_j = min(s·w_j, R·n_j); "shift", the projection of P_j·B on the bounds.
        pick: order of the members: a name of PICKS.
        dynamic: default of `dynamic`: True if the draw is renewed each epoch.
        grouping: "clusters", or "pool" for methods without clusters.
        options: names of the weight's options and their defaults.
        min_per_cluster: default of the smallest quota of a cluster.
        per_cluster: True if the budget may be given as a maximum per cluster.
        registered: True if made by `register_method`; plans then hold the hash of its weights.
    """

    summary: str
    source: str
    weight: Callable[..., npt.NDArray[np.float64]]
    fill: Fill = "scale"
    pick: str = "random"
    dynamic: bool = True
    grouping: Literal["clusters", "pool"] = "clusters"
    options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    min_per_cluster: int = 0
    per_cluster: bool = False
    registered: bool = False


_DBP = MappingProxyType({"temperature": 0.1, "neighbours": float(NEIGHBOURS)})
_METHODS: dict[str, Method] = {
    "dbp": Method(
        "Density-Based Pruning: more from complex clusters, the hardest samples of each, once",
        "Abbas et al., ICLR 2024, section 3.2",
        complexity,
        fill="shift",
        pick="hardest",
        dynamic=False,
        options=_DBP,
        min_per_cluster=1,
    ),
    "ssp": Method(
        "SSP-Pruning: in proportion to cluster size, the hardest samples of each, once",
        "Sorscher et al., NeurIPS 2022",
        proportional,
        pick="hardest",
        dynamic=False,
    ),
    "dynamics": Method(
        "DynamiCS: in proportion to size^alpha, with a new draw each epoch",
        "Liang et al., ECCV 2026, section 3",
        power,
        options=MappingProxyType({"alpha": 0.2}),
    ),
    "density": Method(
        "DynamiCS by the density around the cluster instead of its size; needs a clustering made with `density`",
        "tailwise: docs/guides/density.md",
        by_density,
        options=MappingProxyType({"alpha": 0.2}),
    ),
    "soft-cap": Method(
        "in proportion to size up to a threshold, and to size^alpha above it",
        "tailwise",
        soft_cap,
        options=MappingProxyType({"threshold": 0.0, "alpha": 0.2}),
    ),
    "dbp-dynamic": Method(
        "Density-Based Pruning's weights, with a new draw each epoch as in DynamiCS",
        "tailwise",
        complexity,
        options=_DBP,
    ),
    "flat": Method("the same number from every cluster", "DynamiCS with alpha = 0", flat, per_cluster=True),
    "proportional": Method("in proportion to cluster size", "DynamiCS with alpha = 1", proportional),
    "cap": Method(
        "at most a given number from every cluster, once",
        "as MetaCLIP caps its entries: Xu et al., ICLR 2024",
        flat,
        dynamic=False,
        per_cluster=True,
    ),
    "random": Method("every sample alike; needs no clusters", "baseline", flat, grouping="pool"),
    "top-score": Method(
        "the samples of highest score (by default image-text cosine), once; needs no clusters",
        "baseline: LAION's and DataComp's CLIP-score filter",
        flat,
        pick="highest",
        dynamic=False,
        grouping="pool",
    ),
}
METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
MIXTURE = Method("a given share of an epoch from each group", "tailwise", by_shares)

# Bounds of options by name: least, most, whether whole numbers only.
OPTIONS: Mapping[str, tuple[float, float, bool]] = MappingProxyType(
    {
        "alpha": (0.0, 1.0, False),  # 0 is flat, 1 proportional
        "temperature": (1e-4, 1e9, False),
        "neighbours": (1, 1e6, True),
        "threshold": (0.0, 1e12, False),  # 0: the mean size
    }
)


def register_method(
    name: str,
    *,
    summary: str = "",
    source: str = "",
    fill: Fill = "scale",
    pick: str = "random",
    dynamic: bool = True,
    min_per_cluster: int = 0,
) -> Callable[[Weight], Weight]:
    """Return a decorator that makes a weight function a method in this process; on the command line, `plan` has the option `methods`.

    Its keyword-only parameters with defaults become the method's options. Plans hold the hash of its weights, so that a changed function
    is noticed.

    Args:
        name: name of the method.
        summary: one line for users.
        source: paper and section.
        fill: see Method.
        pick: see Method.
        dynamic: see Method.
        min_per_cluster: see Method.

    Raises:
        UserError: the name is one of tailwise's methods, or fill or pick is unknown.
    """
    if name in _METHODS and not _METHODS[name].registered:
        raise UserError(f"{name!r} is a method of tailwise: choose another name for yours")
    if fill not in {"scale", "shift"} or pick not in PICKS:
        allowed = f"fill {fill!r} must be scale or shift, pick {pick!r} one of {', '.join(PICKS)}"
        raise UserError(f"method {name!r}: {allowed}")

    def register(weight: Weight) -> Weight:
        parameters = inspect.signature(weight).parameters.values()
        options = {item.name: float(item.default) for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY}
        _METHODS[name] = Method(
            summary or (inspect.getdoc(weight) or name).splitlines()[0],
            source or f"{weight.__module__}.{weight.__qualname__}",
            weight,
            fill,
            pick,
            dynamic and PICKS[pick].by is None,
            options=MappingProxyType(options),
            min_per_cluster=min_per_cluster,
            registered=True,
        )
        return weight

    return register


def load_methods(path: Path) -> None:
    """Run a Python file that registers methods. Raise a UserError if it fails, or registers no method."""
    before = dict(_METHODS)
    try:
        runpy.run_path(str(path), run_name=path.stem)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file may raise anything
        raise UserError(f"{path} can't be run ({type(error).__name__}: {error})") from error
    if before == _METHODS:
        raise UserError(f"{path} registers no method: decorate a function with @tailwise.register_method('NAME')")


def find_method(name: str) -> Method:
    """Return the method of a name, or raise a UserError that suggests one."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: {did_you_mean(name, METHODS)}")
    return METHODS[name]


def method_options(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """Return the options of a method, with its defaults for those that are None; raise a UserError for an unknown or invalid option."""
    method = find_method(name)
    options = dict(method.options)
    for option, value in given.items():
        if value is None:
            continue
        if option not in options:
            having = ", ".join(known for known, item in METHODS.items() if option in item.options) or "no method"
            raise UserError(f"`{option}` does nothing with method {name!r}; it belongs to {having}")
        options[option] = value
    for option, value in options.items():
        least, most, whole = OPTIONS.get(option, (-1e300, 1e300, False))
        if not least <= value <= most or (whole and value != int(value)):
            raise UserError(f"`{option}` {value}: must be a {'whole ' * whole}number between {least:g} and {most:g}")
    return options


def weigh(method: Method, clusters: Clusters, options: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Return the weights of non-empty clusters, float64 [K], or raise a UserError if one is not a positive finite number."""
    try:
        weights = np.asarray(method.weight(clusters, **options), np.float64)
    except UserError:
        raise
    except Exception as error:
        if not method.registered:
            raise
        raise UserError(f"the weight function {method.source} failed ({type(error).__name__}: {error})") from error
    # No scale fills a cluster of weight 0.
    least = 0.0 if method.fill == "shift" else np.nextafter(0.0, 1.0)
    if weights.shape != clusters.size.shape or not np.isfinite(weights).all() or (weights < least).any():
        raise UserError(
            f"the weights must be {len(clusters.size)} positive finite numbers, one a cluster "
            f"(got {weights.shape}, least {weights.min():.3g}): change the options {dict(options)}"
        )
    return weights
