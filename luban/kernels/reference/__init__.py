"""Plain PyTorch that can be checked against the papers line by line."""
