"""Layer 3: optimizers, learning-rate schedules, clipping."""
