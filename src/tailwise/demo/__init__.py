"""A drawn pool, which needs no download: to try tailwise out, and for its tests."""
