"""Evaluation of checkpoints: zero-shot classification, also by the training frequency of classes, and retrieval."""

from tailwise.evaluate.run import Evaluation, evaluate, mean_over_sets

__all__ = ["Evaluation", "evaluate", "mean_over_sets"]
