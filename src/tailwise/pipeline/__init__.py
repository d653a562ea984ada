"""Pipelines: the commands that take a pool from import to exports, in order."""
