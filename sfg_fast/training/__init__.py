"""Training: the objective (eq. 1 and 2), its configuration, checkpoints and the loop."""
