"""Layer 4: training checkpoints as safetensors and JSON. Nothing is ever pickled."""
