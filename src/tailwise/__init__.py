"""tailwise: which image-text samples to train CLIP on, and in which epoch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailwise.catalog import Catalog
    from tailwise.encoders import EncoderOptions
    from tailwise.errors import ConflictError, DamagedError, NotFoundError, UnsupportedError, UserError
    from tailwise.evaluate import EvaluateOptions, Evaluation
    from tailwise.evaluate import evaluate as evaluate_checkpoint
    from tailwise.export import export as export_plan
    from tailwise.loader import Loader
    from tailwise.plan import Plan
    from tailwise.plan.explain import explain
    from tailwise.plan.methods import register_method
    from tailwise.requests import PlanRequest, ScoreRequest
    from tailwise.stages.cluster import cluster, extend_clustering
    from tailwise.stages.dedup import dedup
    from tailwise.stages.embed import EmbedOptions, embed
    from tailwise.stages.filter import FilterRule, filter_samples, try_filter
    from tailwise.stages.group import group
    from tailwise.stages.group_entries import group_by_entry
    from tailwise.stages.import_pool import import_pool
    from tailwise.stages.plan import make_plan

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "ConflictError",
    "DamagedError",
    "EmbedOptions",
    "EncoderOptions",
    "EvaluateOptions",
    "Evaluation",
    "FilterRule",
    "Loader",
    "NotFoundError",
    "Plan",
    "PlanRequest",
    "ScoreRequest",
    "UnsupportedError",
    "UserError",
    "cluster",
    "dedup",
    "embed",
    "evaluate_checkpoint",
    "explain",
    "export_plan",
    "extend_clustering",
    "filter_samples",
    "group",
    "group_by_entry",
    "import_pool",
    "make_plan",
    "register_method",
    "try_filter",
]

_HOMES = {
    "Catalog": ("tailwise.catalog", "Catalog"),
    "EmbedOptions": ("tailwise.stages.embed", "EmbedOptions"),
    "EncoderOptions": ("tailwise.encoders", "EncoderOptions"),
    "EvaluateOptions": ("tailwise.evaluate", "EvaluateOptions"),
    "Evaluation": ("tailwise.evaluate", "Evaluation"),
    "FilterRule": ("tailwise.stages.filter", "FilterRule"),
    "Loader": ("tailwise.loader", "Loader"),
    "Plan": ("tailwise.plan", "Plan"),
    "PlanRequest": ("tailwise.requests", "PlanRequest"),
    "ScoreRequest": ("tailwise.requests", "ScoreRequest"),
    **{
        name: ("tailwise.errors", name)
        for name in ("ConflictError", "DamagedError", "NotFoundError", "UnsupportedError", "UserError")
    },
    "cluster": ("tailwise.stages.cluster", "cluster"),
    "dedup": ("tailwise.stages.dedup", "dedup"),
    "embed": ("tailwise.stages.embed", "embed"),
    "evaluate_checkpoint": ("tailwise.evaluate", "evaluate"),
    "extend_clustering": ("tailwise.stages.cluster", "extend_clustering"),
    "explain": ("tailwise.plan.explain", "explain"),
    "export_plan": ("tailwise.export", "export"),
    "filter_samples": ("tailwise.stages.filter", "filter_samples"),
    "group": ("tailwise.stages.group", "group"),
    "group_by_entry": ("tailwise.stages.group_entries", "group_by_entry"),
    "import_pool": ("tailwise.stages.import_pool", "import_pool"),
    "make_plan": ("tailwise.stages.plan", "make_plan"),
    "register_method": ("tailwise.plan.methods", "register_method"),
    "try_filter": ("tailwise.stages.filter", "try_filter"),
}


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports the public names when they are first used: torch and its like take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tailwise' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
