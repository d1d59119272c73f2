"""Topologies: hosts, switches and links as a graph, and the paths through it. One file a family."""
