"""Collation: how the documents of a split become batches of an objective. One file a kind of batch."""
