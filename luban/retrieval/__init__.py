"""Retrieval: passages, indexes, search, evaluation and answers with sources."""
