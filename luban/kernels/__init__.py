"""Layer 1: kernels, each with a plain twin in `reference/`. Triton is imported only by what needs it."""
