"""Workloads: configuration that becomes flows."""
