"""Layer 10: one thin file a verb. `main` finds the verb, runs it, and turns errors into one line."""
