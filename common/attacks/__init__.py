"""Maximisers over the images of a batch: they know a loss and a ball, nothing else."""
