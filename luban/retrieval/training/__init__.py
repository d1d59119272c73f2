"""Training of sentence encoders and cross-encoders for retrieval."""
