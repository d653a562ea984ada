"""tailwise: which image-text samples to train CLIP on, and in which epoch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailwise.catalog import Catalog as Catalog
    from tailwise.context import Context as Context
    from tailwise.errors import ConflictError as ConflictError
    from tailwise.errors import DamagedError as DamagedError
    from tailwise.errors import NotFoundError as NotFoundError
    from tailwise.errors import UnsupportedError as UnsupportedError
    from tailwise.errors import UserError as UserError
    from tailwise.evaluate.run import Evaluation as Evaluation
    from tailwise.evaluate.run import evaluate as evaluate_checkpoint
    from tailwise.export import export as export_plan
    from tailwise.loader.epoch import EpochDataset as EpochDataset
    from tailwise.loader.epoch import EpochStream as EpochStream
    from tailwise.loader.loader import Loader as Loader
    from tailwise.plan import Plan as Plan
    from tailwise.plan.explain import explain as explain
    from tailwise.plan.methods import register_method as register_method
    from tailwise.report.report import make_report as make_report
    from tailwise.requests import BaselinesRequest as BaselinesRequest
    from tailwise.requests import ClusterRequest as ClusterRequest
    from tailwise.requests import DedupRequest as DedupRequest
    from tailwise.requests import EmbedRequest as EmbedRequest
    from tailwise.requests import EncoderRequest as EncoderRequest
    from tailwise.requests import EvaluateRequest as EvaluateRequest
    from tailwise.requests import ExportRequest as ExportRequest
    from tailwise.requests import FilterRequest as FilterRequest
    from tailwise.requests import GroupRequest as GroupRequest
    from tailwise.requests import ImportRequest as ImportRequest
    from tailwise.requests import NamedScoreRequest as NamedScoreRequest
    from tailwise.requests import PlanRequest as PlanRequest
    from tailwise.requests import ReportRequest as ReportRequest
    from tailwise.requests import ScoreRequest as ScoreRequest
    from tailwise.steps.baselines import write_baselines as write_baselines
    from tailwise.steps.clustering.cluster import cluster as cluster
    from tailwise.steps.dedup.dedup import dedup as dedup
    from tailwise.steps.embedding.embed import embed as embed
    from tailwise.steps.grouping.group import group as group
    from tailwise.steps.importing.pool import import_pool as import_pool
    from tailwise.steps.planning.plan import make_plan as make_plan
    from tailwise.steps.scoring.filter import filter_samples as filter_samples
    from tailwise.steps.scoring.filter import try_filter as try_filter
    from tailwise.steps.scoring.named import make_named_score as make_named_score

__version__ = "0.1.0"

_MODULES = {  # of the public names
    "catalog": "Catalog",
    "context": "Context",
    "errors": "ConflictError DamagedError NotFoundError UnsupportedError UserError",
    "evaluate.run": "Evaluation",
    "loader.epoch": "EpochDataset EpochStream",
    "loader.loader": "Loader",
    "plan": "Plan",
    "plan.explain": "explain",
    "plan.methods": "register_method",
    "report.report": "make_report",
    "requests": "ClusterRequest DedupRequest EmbedRequest EncoderRequest EvaluateRequest FilterRequest "
    "GroupRequest ImportRequest NamedScoreRequest PlanRequest ReportRequest ScoreRequest ExportRequest BaselinesRequest",
    "steps.baselines": "write_baselines",
    "steps.clustering.cluster": "cluster",
    "steps.dedup.dedup": "dedup",
    "steps.embedding.embed": "embed",
    "steps.grouping.group": "group",
    "steps.importing.pool": "import_pool",
    "steps.planning.plan": "make_plan",
    "steps.scoring.filter": "filter_samples try_filter",
    "steps.scoring.named": "make_named_score",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
_RENAMED = {"evaluate_checkpoint": ("evaluate.run", "evaluate"), "export_plan": ("export", "export")}
__all__ = [*_HOMES, "evaluate_checkpoint", "export_plan"]  # noqa: PLE0604


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name when it is first used: torch and its like take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'tailwise' has no attribute {name!r}")
    home, there = _RENAMED.get(name) or (_HOMES[name], name)
    return getattr(importlib.import_module(f"tailwise.{home}"), there)
