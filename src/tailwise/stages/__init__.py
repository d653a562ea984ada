"""The stages: each a map, reduce or regroup over the catalog."""
