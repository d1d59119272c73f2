"""Training and using vocabularies, and the one function that turns a conversation into tokens. No torch."""
