"""Layer 4: how a model is made ready to train on devices. Models know nothing of it; `apply` fixes the order."""
