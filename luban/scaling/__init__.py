"""Scaling laws: loss against parameters and tokens, fitted to runs, and what they say of a budget."""
