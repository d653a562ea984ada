"""Embedding: encode the images and captions of shards into columns."""
