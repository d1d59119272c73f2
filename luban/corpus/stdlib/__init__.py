"""Python's standard library as text: its modules, definitions and docstrings, and which of them are held out."""
