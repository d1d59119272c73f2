"""Layer 2: predictions from arithmetic alone. No torch."""
