"""Automatic sharding: an IR with labelled dimensions, propagation, passes, and Alpa's two searches. No torch."""
