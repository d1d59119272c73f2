"""A packet-level simulator of cluster networks, with a fluid mode beside it.

Topologies, switches with a shared buffer, congestion control and collectives are data; one compiled event loop runs them all.
`luban.netsim.simulation.Simulation` is the entry point from Python, `luban simulate` the one from the command line.
"""

from pathlib import Path

SHIPPED = Path(__file__).parent / "scenarios"  # scenarios by name
