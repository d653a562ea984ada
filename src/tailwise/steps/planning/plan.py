"""Plan: one entry for all methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tailwise.catalog.catalog import Catalog
from tailwise.context import Context
from tailwise.errors import UserError
from tailwise.plan.methods import METHODS
from tailwise.plan.plan import Plan
from tailwise.requests import ClusterRequest, PlanRequest, refuse_given, refuse_idle
from tailwise.steps.grouping.write import SOURCE
from tailwise.steps.planning.apart import make_between_plan, make_within_plan
from tailwise.steps.planning.balance import make_balanced_plan
from tailwise.steps.planning.bundle import make_bundle_plan
from tailwise.steps.planning.capped import make_capped_plan
from tailwise.steps.planning.mixture import make_mixture
from tailwise.steps.planning.rates import make_rate_plan
from tailwise.steps.planning.weighted import make_weighted_plan
from tailwise.text import did_you_mean


@dataclass(frozen=True)
class OtherMethod:
    """A method that does not weigh clusters."""

    make: Callable[[Catalog, str, PlanRequest, Context], Plan]
    own: tuple[str, ...]  # fields of a request that this method alone has
    shared: tuple[str, ...] = ()  # other fields that it uses
    clustering: str | None = None  # grouping that it goes over, if the request names none


_CAPPED = ("score", "score_file", "temperature", "keep", "budget", "without", "draw")
OTHER_METHODS = {
    "rates": OtherMethod(
        make_rate_plan,
        ("rates", "rate_column", "missing_rate", "max_rejected", "match", "strict"),
        ("above_one", "draw"),
    ),
    "bundle": OtherMethod(make_bundle_plan, ("source",), ("match", "strict")),
    "text-balance": OtherMethod(
        make_balanced_plan,
        ("entries", "concepts", "per_entry", "ignore_case", "plurals"),
        ("keep", "budget", "without"),
    ),
    "scs": OtherMethod(make_capped_plan, ("logits",), (*_CAPPED, "alpha")),
    "hcs": OtherMethod(make_capped_plan, ("logits",), (*_CAPPED, "max_repeats")),
    "mixture": OtherMethod(
        make_mixture,
        ("shares",),
        ("of", "clustering", "keep", "budget", "max_repeats", "without", "pick", "score", "score_file", "draw"),
        clustering=SOURCE,
    ),
    "between": OtherMethod(make_between_plan, ("of",), ("clustering", "draw"), ClusterRequest.name),
    "within": OtherMethod(make_within_plan, ("of",), ("clustering",), ClusterRequest.name),
}


def check_method(method: str) -> None:
    """Refuse a method that is unknown, or empty; a UserError names the known ones."""
    known = [*METHODS, *OTHER_METHODS]
    if method not in known:
        unknown = f"unknown method {method!r}: {did_you_mean(method, known)}"
        raise UserError(unknown if method else f"give a `method`: one of {', '.join(known)}")


def default_clustering(method: str) -> str | None:
    """Return the name of the grouping that plans of a method go over where they name none; None of methods that need none."""
    if method in OTHER_METHODS:
        return OTHER_METHODS[method].clustering
    return ClusterRequest.name if method in METHODS and METHODS[method].grouping == "clusters" else None


def make_plan(catalog: Catalog | str | Path, name: str, request: PlanRequest, context: Context | None = None) -> Plan:
    """Make a plan, or open the finished one of the same request.

    Args:
        catalog: or its path; with a clustering, unless the method needs none.
        name: of the plan.
        request: what is asked for.
        context: runs the tasks and shows progress.

    Raises:
        UserError: the request is out of bounds or contradicts itself, or another plan has this name.
    """
    context = context or Context()
    catalog = Catalog.open(catalog)
    check_method(request.method)
    if chosen := OTHER_METHODS.get(request.method):
        drawn = {"draw"} if request.draw == "bernoulli" else set()  # by which they draw
        used = {"method", "dynamic", "seed", *chosen.own, *chosen.shared, *drawn}
        refuse_idle(request, used, f"with method {request.method!r}")
        return chosen.make(catalog, name, request, context)
    for method, other in OTHER_METHODS.items():
        refuse_given(request, other.own, f"without method {method!r}")
    return make_weighted_plan(catalog, name, request, context)
