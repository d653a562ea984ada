"""`tailwise train`: open_clip's own, unmodified trainer on the samples of a plan."""
