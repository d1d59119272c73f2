"""Layer 8: from a language model to an assistant."""
