"""Layer 7: tasks, scoring, and the measures that say whether a model is any good."""
