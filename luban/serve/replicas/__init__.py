"""Several copies of a server behind one address."""
