"""The first parameters of every profile, and numbers that the algorithms share."""

from __future__ import annotations

LINE_RATE, BASE_RTT, BDP, MSS, MIN_RATE = range(5)  # bytes a ps, ps, bytes, bytes of data a packet, bytes a ps
FIRST = 5  # where an algorithm's own parameters start

BYTES_A_PS = 1.25e-7  # of one Mb/s: rates are configured in Mb/s and used in bytes a ps
MICROSECOND = 1_000_000  # ps

# Codes of the algorithms, in the order in which `dispatch` asks.
CONSTANT, NEWRENO, DCTCP, DCQCN, TIMELY, HPCC, PINT, SWIFT, UFAB = range(9)
