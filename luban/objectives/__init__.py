"""Layer 3: what a model is trained to do. Loss modules give a sum and metrics, never a mean; one count, the collator's,
divides the sum."""
