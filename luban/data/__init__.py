"""Shards of tokens, packing, and a loader whose every batch is a function of seed and step."""
