"""Layer 4: from logits to text. Sampling as data, samplers as pure functions, a contiguous cache, text that streams."""
