"""Position methods: added to the embeddings, rotating queries and keys, or a bias on attention scores."""
