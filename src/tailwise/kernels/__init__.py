"""Kernels: arrays in, arrays out; no I/O, no logging, no global state.

Shape letters: N rows, d dimensions, K centroids, n rows of one chunk.
"""
