"""Rematerialisation schedules of a chain of stages: solvers and a simulator that counts memory. No torch."""
