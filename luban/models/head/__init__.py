"""Heads: what is read off the hidden states. One file a family."""
