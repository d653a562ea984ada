"""Kernels: arrays in, arrays out; no I/O, no logging, no global state.

For use elsewhere: `assign.assign`, `kmeans.kmeans` and `duplicates.duplicate_pairs`, each exact and the same to the bit for any number of
threads, size of chunks and device.

Shape letters: N rows, d dimensions, K centroids, n rows of one chunk.
"""
