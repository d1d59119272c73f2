"""Layer 4: tuning a model with few parameters beside its frozen weights (LoRA and its kin)."""
