"""Training: the optimiser step, the loop around it, depths, validation, start and stop."""
