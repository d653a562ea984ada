"""Plans: weight → quota → (order | stream) → draw."""

from tailwise.plan.methods import METHODS, Method
from tailwise.plan.plan import Plan

__all__ = ["METHODS", "Method", "Plan"]
