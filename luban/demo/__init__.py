"""Layer 9: the newcomer's first run: the whole life, each stage a verb anyone can call."""
