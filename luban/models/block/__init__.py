"""How attention and feed-forward are arranged around the residual stream."""
