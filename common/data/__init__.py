"""Image sources and the data module that feeds them as dict batches in [0, 1]."""
