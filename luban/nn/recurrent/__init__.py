"""Recurrent layers: one file a kind, and how packed rows become sequences for them."""
