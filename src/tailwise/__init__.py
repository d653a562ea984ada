"""tailwise: which image-text samples to train CLIP on, and in which epoch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.context import Context
    from tailwise.errors import ConflictError, DamagedError, NotFoundError, UnsupportedError, UserError
    from tailwise.evaluate import Evaluation
    from tailwise.evaluate import evaluate as evaluate_checkpoint
    from tailwise.export import export as export_plan
    from tailwise.loader.loader import Loader
    from tailwise.plan import Plan
    from tailwise.plan.explain import explain
    from tailwise.plan.methods import register_method
    from tailwise.requests import (
        ClusterRequest,
        DedupRequest,
        EmbedRequest,
        EncoderRequest,
        EvaluateRequest,
        FilterRequest,
        GroupRequest,
        ImportRequest,
        PlanRequest,
        ScoreRequest,
        ShardsRequest,
    )
    from tailwise.steps.clustering.cluster import cluster
    from tailwise.steps.dedup.dedup import dedup
    from tailwise.steps.embedding.embed import embed
    from tailwise.steps.grouping.group import group
    from tailwise.steps.importing.pool import import_pool
    from tailwise.steps.planning.plan import make_plan
    from tailwise.steps.scoring.filter import filter_samples, try_filter

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "ClusterRequest",
    "ConflictError",
    "Context",
    "DamagedError",
    "DedupRequest",
    "EmbedRequest",
    "EncoderRequest",
    "EvaluateRequest",
    "Evaluation",
    "FilterRequest",
    "GroupRequest",
    "ImportRequest",
    "Loader",
    "NotFoundError",
    "Plan",
    "PlanRequest",
    "ScoreRequest",
    "ShardsRequest",
    "UnsupportedError",
    "UserError",
    "cluster",
    "dedup",
    "embed",
    "evaluate_checkpoint",
    "explain",
    "export_plan",
    "filter_samples",
    "group",
    "import_pool",
    "make_plan",
    "register_method",
    "try_filter",
]

_HOMES = {  # of those that are not in requests or errors
    "Catalog": "tailwise.catalog",
    "Context": "tailwise.context",
    "Evaluation": "tailwise.evaluate",
    "Loader": "tailwise.loader.loader",
    "Plan": "tailwise.plan",
    "cluster": "tailwise.steps.clustering.cluster",
    "dedup": "tailwise.steps.dedup.dedup",
    "embed": "tailwise.steps.embedding.embed",
    "evaluate_checkpoint": "tailwise.evaluate",
    "explain": "tailwise.plan.explain",
    "export_plan": "tailwise.export",
    "filter_samples": "tailwise.steps.scoring.filter",
    "group": "tailwise.steps.grouping.group",
    "import_pool": "tailwise.steps.importing.pool",
    "make_plan": "tailwise.steps.planning.plan",
    "register_method": "tailwise.plan.methods",
    "try_filter": "tailwise.steps.scoring.filter",
}
_THERE = {"evaluate_checkpoint": "evaluate", "export_plan": "export"}  # names of packages here


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name when it is first used: torch and its like take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'tailwise' has no attribute {name!r}")
    home = _HOMES.get(name, "tailwise.requests" if name.endswith("Request") else "tailwise.errors")
    return getattr(importlib.import_module(home), _THERE.get(name, name))
