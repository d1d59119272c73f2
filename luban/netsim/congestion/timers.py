"""Timers of congestion control."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.engine.access import lane_at
from luban.netsim.engine.heap import push
from luban.netsim.engine.layout import TIMER_A


@compiled
def arm(s, lane, which, time):
    """Call `on_timer` of the lane at `time` (ps), unless timer `which` (0 or 1) is already set. A timer that rings before its
    deadline, since that was put off, is set again by `on_timer`."""
    control = lane_at(s, lane)
    if not control.timer_pending & (1 << which):
        control.timer_pending |= 1 << which
        push(s, int(time), TIMER_A + which, lane)
