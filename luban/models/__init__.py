"""Layer 3: whole models. A `ModelSpec` is data; `build_model` assembles it; `describe` counts what it would do."""
