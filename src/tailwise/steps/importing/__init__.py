"""Import: index shards, join metadata and embeddings."""
