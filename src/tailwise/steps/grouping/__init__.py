"""Grouping: clusters that are given, by a column or by words of captions."""
