"""Arrangements: where norms and residual connections stand in a layer. One file each."""
