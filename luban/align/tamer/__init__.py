"""TAMER: an agent that learns from what a trainer thinks of its actions."""
