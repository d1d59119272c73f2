"""Layer 0: what every package stands on. Imports nothing of Luban and no torch."""
