"""The compiled event loop: integer picoseconds, flat arrays, no Python inside."""
