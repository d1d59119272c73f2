"""Jobs of a shared cluster whose requests don't fit them, in simulation (DLRover, Wang et al. 2023)."""
