"""The catalog: one table of samples."""

from tailwise.catalog.catalog import Catalog, Part, Snapshot

__all__ = ["Catalog", "Part", "Snapshot"]
