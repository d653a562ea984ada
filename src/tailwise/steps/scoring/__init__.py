"""Scores of samples, and the filters that use them."""
