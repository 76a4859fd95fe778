"""Training: the pure step, optimiser, checkpoints, and the door to Ray Train."""
