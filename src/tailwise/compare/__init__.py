"""Comparison: methods × seeds with equal samples seen, and the confidence intervals of the differences."""
