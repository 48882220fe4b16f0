"""One training run on N ranks: loop, optimiser, checkpoints, tracking."""
