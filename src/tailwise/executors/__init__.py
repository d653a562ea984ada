"""Executors run map work; stages don't know which."""
