"""Planning: choose how many samples each group gives, and which."""
