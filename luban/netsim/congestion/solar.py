"""Solar (Miao et al. 2022): storage I/O in which one packet is one block.

A block of 4 KB is a packet that stands for itself, so that nothing is kept in order; a few paths carry the blocks of one I/O, each
with HPCC's window of its own, and a path that does not answer is left for the others and tried again later (`engine/sender.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from luban.netsim.congestion.base import Recovery, Routing
from luban.netsim.congestion.hpcc import Hpcc


@dataclass(frozen=True, kw_only=True)
class Solar(Hpcc):
    """Solar: HPCC a path, blocks in any order."""

    payload: int = 4096  # bytes of data a packet: one storage block
    recovery: Recovery = "selective"  # of lost packets
    reorder: int = 0  # blocks come in any order: only a timeout makes one count as lost
    routing: Routing = "per_path"  # windows by path
    max_paths: int = 4  # of shortest paths, how many a flow uses
    rto_us: float = 1000.0  # smallest retransmission timeout, microseconds
    probe_us: float = 5000.0  # after so long an ejected path is tried again, microseconds
