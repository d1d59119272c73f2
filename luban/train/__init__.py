"""Layer 6: one training loop for every next-token objective: step, validation, checkpoints, interruption."""
