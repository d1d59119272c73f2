"""Scores of texts against references: pure functions that evaluations of every kind share."""
