"""Collectives as dependency graphs: each step of each rank is a flow that waits for those before it."""
