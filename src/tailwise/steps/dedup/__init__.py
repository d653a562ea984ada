"""Deduplication: near-duplicates inside the clusters of a clustering."""
