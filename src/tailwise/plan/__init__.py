"""Plans: weight → quota → pick → draw."""

from tailwise.plan.methods import METHODS, Method
from tailwise.plan.plan import Plan

__all__ = ["METHODS", "Method", "Plan"]
