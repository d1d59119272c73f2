"""Elastic training: workers that die, hang, join and leave while the others go on (DLRover, Wang et al. 2023)."""
