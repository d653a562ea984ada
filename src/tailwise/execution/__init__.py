"""Executors run map work; the steps do not know which."""
