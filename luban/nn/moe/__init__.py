"""Mixture of experts: a feed-forward network of which each token uses some parts, chosen by a router."""
