"""A simulation: the compiled loop in steps, with progress, a limit of memory, deadlocks named, and what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.log import progress, say
from luban.netsim.compiled import is_cached
from luban.netsim.congestion.base import Transport
from luban.netsim.deadlock import find_deadlock
from luban.netsim.engine import layout as at
from luban.netsim.engine.build import build_state, enlarge_pool
from luban.netsim.flows import NEVER, Flow
from luban.netsim.switches import Switches
from luban.netsim.topology.network import Network

STEP = 1_000_000  # events between two looks at the clock
MOST_PACKETS = 1 << 23  # in flight at once: about 4 GB with telemetry
TIME_IS_OVER = "the time limit was reached"  # why a run ended
NAMED = 8  # unfinished flows that a reason names
STALL_AFTER = 50_000_000_000  # ps without a delivery after which a deadlock is looked for


@dataclass(frozen=True)
class Outcome:
    """How far a simulation came."""

    complete: bool  # whether every flow has finished
    reason: str  # why it ended
    simulated: float  # seconds
    seconds: float  # of real time
    events: int
    delivered: int  # data packets
    hops: int  # links crossed by packets
    deadlock: tuple[str, ...] = ()  # paused ports that wait for each other in a circle, the first again at the end


class Simulation:
    """Flows over a network; `run` may be called again to go on."""

    def __init__(
        self,
        network: Network,
        flows: Sequence[Flow],
        transport: Transport,
        switches: Switches | None = None,
        *,
        seed: int = 0,
        base_rtt: int | None = None,
        watched_ports: Sequence[int] = (),
        watched_flows: Sequence[int] = (),
        sample_every: int = 0,
        watch_busiest: int = 0,
    ):
        """See `build_state`; `watch_busiest` samples the ports that most paths cross."""
        self.network, self.flows, self.transport = network, list(flows), transport
        self.switches = switches or Switches()
        self.state = build_state(
            network,
            self.switches,
            transport,
            self.flows,
            seed=seed,
            base_rtt=base_rtt,
            watched_ports=watched_ports,
            watched_flows=watched_flows,
            watch_busiest=watch_busiest,
            sample_every=sample_every,
        )
        self.state.world["stall_after"] = STALL_AFTER
        self._seconds = 0.0
        self._deadlock: tuple[str, ...] = ()

    def run(self, until: int = NEVER, *, show: bool = False) -> Outcome:
        """Run until every flow has finished, or until `until` (ps). Ctrl-C ends it early with what there is, and a run without
        `until` ends where only flows are left that have no path over links that work, and what waits for them. Ports that are
        paused and wait for each other in a circle end it too: the outcome's reason and `deadlock` name them.
        """
        from luban.netsim.engine.loop import advance

        if not is_cached(advance):
            say("compiling the event loop, once for this version of Luban: about half a minute")
        advance(self.state.world, until, 0)  # compiled or loaded before the clock starts
        began, reason = time.perf_counter(), ""
        world = self.state.world[0]
        with progress("simulating", total=len(self.flows), unit="flows") as bar:
            done = 0
            while not reason:
                try:
                    status = advance(self.state.world, until, STEP)
                except KeyboardInterrupt:
                    reason = "interrupted"
                    break
                reason = self._after(status, until)
                world = self.state.world[0]
                if show:
                    finished = len(self.flows) - int(world["unfinished"])
                    bar.advance(
                        finished - done, f"simulated {world['now'] / 1e9:.3g} ms, {world['events'] / 1e6:.0f} M events"
                    )
                    done = finished
        self._seconds += time.perf_counter() - began
        world = self.state.world[0]
        return Outcome(
            complete=world["unfinished"] == 0,
            reason=reason,
            simulated=float(world["now"]) / 1e12,
            seconds=self._seconds,
            events=int(world["events"]),
            delivered=int(world["delivered"]),
            hops=int(world["hops"]),
            deadlock=self._deadlock,
        )

    def _after(self, status: int, until: int) -> str:
        """What to do after a step; a reason to stop, or nothing."""
        world = self.state.world[0]
        if status == at.GROW:
            if len(self.state.packets) >= MOST_PACKETS:
                return f"more than {MOST_PACKETS} packets in flight: give the transport a window, or fewer flows"
            enlarge_pool(self.state)
        elif status == at.STALLED or (status == at.IDLE and world["unfinished"]):
            circle = find_deadlock(self.network, self.state)
            if circle:
                self._deadlock = tuple(circle)
                kind = "credit" if self.switches.flow_control == "credits" else "PFC"
                return f"{kind} deadlock at {world['now'] / 1e9:.3f} ms: {' waits for '.join(circle)}"
            if status == at.IDLE:
                return "nothing more can happen, and flows are unfinished"
            if until == NEVER and (cut_off := self.cut_off()):
                return self._without_path(cut_off)
            world["last_progress"] = world["now"]
        return {at.FINISHED: "finished", at.IDLE: "finished", at.UNTIL: TIME_IS_OVER}.get(status, "")

    def cut_off(self) -> list[int]:
        """The flows whose every path crosses a link that has failed, where nothing else can happen any more: all other unfinished
        flows wait for them. Empty where anything else is under way or still to start."""
        found = []
        for i, row in enumerate(self.state.flows):
            if row["finish"] >= 0 or row["waits_for"] > 0:
                continue
            if not row["active"] or any(self._is_whole(path) for path in self._usable_paths(row)):
                return []
            found.append(i)
        return found

    def _usable_paths(self, row: np.void) -> list[int]:
        """The paths on which a flow may still send: without those that it has ejected for good."""
        if row["routing"] != at.BY_LANE:
            return list(range(row["first_path"], row["first_path"] + row["paths"]))
        lanes = self.state.lanes[row["first_lane"] : row["first_lane"] + row["lanes"]]
        tried_again = self.state.world[0]["probe_gap"] > 0
        return [int(lane["path"]) for lane in lanes if tried_again or not lane["ejected"]]

    def _is_whole(self, path: int) -> bool:
        """Whether all links of a path work."""
        start, end = self.state.path_start[path : path + 2]
        return not self.state.ports["down"][self.state.path_ports[start:end]].any()

    def _without_path(self, cut_off: list[int]) -> str:
        names = [self.network.names[node] for node in self.network.hosts]
        said = [f"{i} ({names[self.flows[i].src]}→{names[self.flows[i].dst]})" for i in cut_off[:NAMED]]
        more = f" and {len(cut_off) - NAMED} more" if len(cut_off) > NAMED else ""
        waiting = int(self.state.world[0]["unfinished"]) - len(cut_off)
        others = f"; {waiting} wait for them" if waiting else ""
        return f"no working path is left to unfinished flows: {', '.join(said)}{more}{others}"

    def fail_link(self, link: int) -> None:
        """From now on the link loses everything that is sent over it, both ways."""
        self.state.ports["down"][2 * link : 2 * link + 2] = 1

    def repair_link(self, link: int) -> None:
        """From now on the link carries packets again."""
        self.state.ports["down"][2 * link : 2 * link + 2] = 0

    def finish_times(self) -> np.ndarray:
        """When each flow had arrived whole, seconds; NaN for unfinished ones."""
        finish = self.state.flows["finish"]
        return np.where(finish < 0, np.nan, finish / 1e12)

    def completion_times(self) -> np.ndarray:
        """Seconds from each flow's start, or that of the flow that it answers, to its last byte at the receiver; NaN for unfinished
        ones."""
        rows = self.state.flows
        since = np.array([i if flow.since is None else flow.since for i, flow in enumerate(self.flows)], np.int64)
        return np.where(rows["finish"] < 0, np.nan, (rows["finish"] - rows["began"][since]) / 1e12)

    def makespan(self) -> float:
        """Seconds until the last flow had arrived; NaN where one has not."""
        return float(np.max(self.finish_times()))

    def samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times in seconds (n,); bytes queued and bytes sent of the watched ports (n, ports, 2); bytes received of the watched
        flows (n, flows)."""
        n = int(self.state.world[0]["samples"])
        s = self.state
        return s.sample_times[:n] / 1e12, s.port_samples[:n].copy(), s.flow_samples[:n].copy()
