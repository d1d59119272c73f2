"""Adapters in the layout of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`."""
