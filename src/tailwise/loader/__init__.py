"""The loader: a plan's samples in batches, from the tars as they lie."""

from tailwise.loader.dataset import Batch, Replacement
from tailwise.loader.loader import Loader

__all__ = ["Batch", "Loader", "Replacement"]
