"""Layer 6: a model at work for people and programs: the engine, the HTTP API, the chat page."""
