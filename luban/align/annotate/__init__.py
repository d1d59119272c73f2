"""Preferences from simulated annotators (Dubois et al. 2023, "AlpacaFarm") and from people at a page."""
