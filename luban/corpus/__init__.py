"""Raw text → a clean, split, documented corpus: sources, steps, held-out split, Parquet files."""
