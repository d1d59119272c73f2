"""Where a token stands: added to the embedding, turned into queries and keys, or added to the scores."""
