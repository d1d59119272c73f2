"""Kinds of tasks: what is asked of the model for an item, and how its answers are scored."""
