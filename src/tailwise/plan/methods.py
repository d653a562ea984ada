"""All methods on one page: weight → quota → pick → draw. A new method is one line in METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from tailwise.errors import UserError
from tailwise.plan.weights import Clusters, complexity, flat, power, proportional

Fill = Literal["scale", "shift"]
Pick = Literal["random", "hardest", "easiest"]
PICKS: tuple[Pick, ...] = ("random", "hardest", "easiest")


@dataclass(frozen=True)
class Method:
    """One way to decide how much of each cluster to draw, and which members.

    Attributes:
        summary: one line for people.
        source: paper and section.
        weight: (clusters, **options) → float64 [K], > 0.
        fill: how weights meet the budget: "scale", q_j = min(s·w_j, R·n_j); "shift", the projection of P_j·B on the bounds.
        pick: which members: "random", or "hardest" (farthest from the centroid) or "easiest" first.
        dynamic: whether the draw is renewed each epoch by default.
        grouping: "clusters", or "pool" for methods that need none.
        options: names of the weight's options and their defaults.
    """

    summary: str
    source: str
    weight: Callable[..., npt.NDArray[np.float64]]
    fill: Fill = "scale"
    pick: Pick = "random"
    dynamic: bool = True
    grouping: Literal["clusters", "pool"] = "clusters"
    options: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dbp": Method(
            "Density-Based Pruning: more from complex clusters, the hardest samples of each, once",
            "Abbas et al., ICLR 2024, section 3.2",
            complexity,
            fill="shift",
            pick="hardest",
            dynamic=False,
            options=MappingProxyType({"temperature": 0.1}),
        ),
        "ssp": Method(
            "SSP-Pruning: in proportion to cluster size, the hardest samples of each, once",
            "Sorscher et al., NeurIPS 2022",
            proportional,
            pick="hardest",
            dynamic=False,
        ),
        "dynamics": Method(
            "DynamiCS: in proportion to size^alpha, drawn anew each epoch",
            "Liang et al., ECCV 2026, section 3",
            power,
            options=MappingProxyType({"alpha": 0.2}),
        ),
        "flat": Method("the same number from every cluster", "DynamiCS with alpha = 0", flat),
        "proportional": Method("in proportion to cluster size", "DynamiCS with alpha = 1", proportional),
        "random": Method("every sample alike; needs no clusters", "baseline", flat, grouping="pool"),
    }
)


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: use {', '.join(METHODS)}")
    return METHODS[name]


def method_options(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The options of a method, its defaults filled in.

    Args:
        name: of the method.
        given: option → value, None where the user gave none.

    Raises:
        UserError: an option that this method doesn't have, or a value out of bounds.
    """
    method = find_method(name)
    options = dict(method.options)
    for option, value in given.items():
        if value is None:
            continue
        if option not in options:
            having = ", ".join(known for known, item in METHODS.items() if option in item.options) or "no method"
            raise UserError(f"--{option} does nothing with method {name!r}; it belongs to {having}")
        options[option] = value
    if not 0 <= options.get("alpha", 0) <= 1:
        raise UserError(f"--alpha {options['alpha']}: must lie in [0, 1] (0 is flat, 1 proportional)")
    if not 1e-4 <= options.get("temperature", 1) < float("inf"):
        raise UserError(f"--temperature {options['temperature']}: must be a finite number of at least 0.0001")
    return options


def weigh(method: Method, clusters: Clusters, options: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """The weights of non-empty clusters.

    Raises:
        UserError: the method's weight is not a positive finite number for each cluster.
    """
    weights = np.asarray(method.weight(clusters, **options), np.float64)
    least = (
        0.0 if method.fill == "shift" else np.nextafter(0.0, 1.0)
    )  # by scale, a cluster of weight 0 could never be filled
    if weights.shape != clusters.size.shape or not np.isfinite(weights).all() or (weights < least).any():
        raise UserError(
            f"the weights must be {len(clusters.size)} positive finite numbers, one a cluster "
            f"(got {weights.shape}, least {weights.min():.3g}): change the options {dict(options)}"
        )
    return weights
