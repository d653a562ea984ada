"""Upkeep of a catalog: status, verification, takedown, moved shards."""
