"""Training of sentence encoders for retrieval."""
