"""Retrieval-augmented generation as its paper has it (Lewis et al. 2020): passages as a latent variable."""
