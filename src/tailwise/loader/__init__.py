"""The loader: a plan's samples in batches, from the tars as they lie."""
