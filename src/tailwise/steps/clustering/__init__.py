"""Clustering: k-means over an embedding column, in bounded memory."""
