"""Layer 5: from a name or path to a model with its tokenizer, lineage checked; and out again."""
