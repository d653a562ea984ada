"""Evaluation of checkpoints: zero-shot classification, by how often classes were trained on, and retrieval."""

from tailwise.evaluate.run import Evaluation, evaluate, mean_over_sets

__all__ = ["Evaluation", "evaluate", "mean_over_sets"]
