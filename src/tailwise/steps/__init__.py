"""Steps: what each task of import, embedding, dedup, scoring, clustering, grouping, planning and upkeep computes."""
