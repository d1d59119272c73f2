"""Mixers: what lets the tokens of a row exchange information. One file an algorithm."""
