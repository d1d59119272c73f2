"""Layer 2: model parts. One file an algorithm, one registry line each; a part's configuration sits beside its module.

A part's configuration is a frozen dataclass with `build(…)`, which makes the torch module, and `ops(…)`, which
counts what the module will do. No part holds buffers: tables that follow from the configuration are computed
once a forward in float32, so a module's state is its parameters alone, whatever device or precision it is moved to.
"""
