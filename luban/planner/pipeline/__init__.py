"""Schedules of pipeline parallelism as tables, one file a schedule, and what they cost. Pure Python."""
