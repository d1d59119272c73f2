"""Functions that a model may call: the protocol, the loop, a calculator, search, databases."""
