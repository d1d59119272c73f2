"""Judges of answers: rules, models, endpoints; pairs in both orders, and single grades."""
