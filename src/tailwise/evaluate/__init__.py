"""Evaluation of checkpoints: zero-shot classification, also by the training frequency of classes, and retrieval."""
