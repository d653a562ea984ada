"""`tailwise train`: open_clip's own trainer, unmodified, fed by a plan."""
