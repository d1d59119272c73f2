"""Records of flows, of their lanes, and of what waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.congestion.base import Transport
from luban.netsim.engine import layout as at
from luban.netsim.engine.paths import sending_rate
from luban.netsim.flows import NEVER, Flow
from luban.netsim.topology.network import Network, Path

MOST_PACKETS = 1 << 30  # of a flow: their numbers are 32 bits
MOST_BYTES = 1 << 60  # of a flow
RECOVERIES = {"go_back_n": at.GO_BACK_N, "newreno": at.NEWRENO, "selective": at.SELECTIVE}
ROUTINGS = {
    "ecmp": at.ONE_PATH,
    "spray": at.SPRAY,
    "round_robin": at.ROUND_ROBIN,
    "per_path": at.BY_LANE,
    "adaptive": at.ADAPTIVE,
}


def flow_arrays(
    network: Network,
    transport: Transport,
    flows: Sequence[Flow],
    paths: Sequence[Path],
    first: np.ndarray,
    counts: np.ndarray,
    rtt: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Records of flows, of lanes, of profiles (one a rate of host ports), and the flows that wait for others, as slices of one
    array.

    Args:
        first, counts: of each flow the number of its first path and how many it has.
        rtt: ps, as the congestion control has it for its base.

    Raises:
        ConfigError: a flow that can't be.
    """
    rows = np.zeros(len(flows), at.flow_type)
    for i, flow in enumerate(flows):
        require_possible(i, flow, len(flows))
    for name in ("start", "src", "dst", "cls", "size"):
        rows[name] = [getattr(flow, name) for flow in flows]
    rows["waits_for"] = [len(flow.after) for flow in flows]
    rows["duration"] = [flow.duration or 0 for flow in flows]
    sends = np.array([flow.duration is None for flow in flows], bool)
    by_lane = transport.routing == "per_path"
    rows["first_path"][sends], rows["paths"] = first[sends], counts
    rows["lanes"] = counts if by_lane else np.minimum(counts, 1)
    rows["first_lane"] = np.concatenate([[0], np.cumsum(rows["lanes"])[:-1]]) if len(flows) else 0
    _packets(rows, sends, transport)
    rows["weight"][sends] = [max(1, round(flow.weight * 1000)) for flow in flows if flow.duration is None]
    profiles = _profiles(rows, sends, network, transport, paths, rtt)
    for name in ("finish", "began", "next_ready", "last_nack", "recover", "held"):
        rows[name] = -1
    rows["cc"], rows["telemetry"] = transport.code, transport.telemetry
    rows["recovery"], rows["routing"] = RECOVERIES[transport.recovery], ROUTINGS[transport.routing]
    rows["reorder"] = transport.reorder or 1 << 30
    rows["rto_min"] = round(transport.rto_us * 1e6)
    rows["cnp_gap"] = round(transport.cnp_gap_us() * 1e6)
    rows["last_cnp"] = -NEVER
    return rows, _lanes(rows, by_lane), profiles, _dependents(rows, flows)


def _packets(rows: np.ndarray, sends: np.ndarray, transport: Transport) -> None:
    """How many packets each flow has, and where its bitmaps start."""
    packets = np.where(sends, np.maximum(1, -(-rows["size"] // transport.payload)), 0)
    if (packets > MOST_PACKETS).any():
        i = int(np.argmax(packets > MOST_PACKETS))
        raise ConfigError(
            f"flow {i}: {rows['size'][i]} bytes are {packets[i]} packets of transport.payload {transport.payload}, and a flow has at "
            f"most {MOST_PACKETS}: make it smaller, or use mode fluid"
        )
    rows["packets"] = packets
    rows["bits"] = np.cumsum(packets) - packets


def _profiles(
    rows: np.ndarray, sends: np.ndarray, network: Network, transport: Transport, paths: Sequence[Path], rtt: int
) -> np.ndarray:
    """Write each flow's port and profile; returns the profiles' parameters."""
    rates: dict[Path, int] = {}
    profiles: dict[int, int] = {}
    for i in np.flatnonzero(sends).tolist():
        number, count = int(rows["first_path"][i]), int(rows["paths"][i])
        path = paths[number]
        if count > 1 and len({paths[p][0] for p in range(number, number + count)}) > 1:
            raise ConfigError(f"flow {i}: its paths leave host {rows['src'][i]} by different ports")
        if path not in rates:
            rates[path] = sending_rate(network, path)
        rows["port"][i] = path[0]
        rows["profile"][i] = profiles.setdefault(rates[path], len(profiles))
    table = np.zeros(max(len(profiles), 1), at.profile_type)
    for rate, index in profiles.items():
        table["params"][index] = transport.parameters(rate, rtt)
    return table


def require_possible(i: int, flow: Flow, flows: int) -> None:
    """Raise ConfigError for a flow that can't be, among so many."""
    if flow.size < 0 or flow.start < 0 or (flow.duration or 0) < 0:
        raise ConfigError(f"flow {i}: size, start and duration must not be below 0")
    if flow.size > MOST_BYTES:
        raise ConfigError(f"flow {i}: {flow.size} bytes are more than {MOST_BYTES}")
    if not 1 <= flow.cls < at.CLASSES:
        raise ConfigError(f"flow {i}: traffic classes are 1 to {at.CLASSES - 1}, {flow.cls} given")
    for other in flow.after:
        if not 0 <= other < flows or other == i:
            raise ConfigError(f"flow {i} waits for flow {other}, which isn't another one of 0 to {flows - 1}")


def _lanes(rows: np.ndarray, paths_by_lane: bool) -> np.ndarray:
    lanes = np.zeros(max(int(rows["lanes"].sum()), 1), at.lane_type)
    flow_of = np.repeat(np.arange(len(rows)), rows["lanes"])
    lanes["flow"][: len(flow_of)] = flow_of
    offset = np.arange(len(flow_of)) - rows["first_lane"][flow_of]
    lanes["path"][: len(flow_of)] = rows["first_path"][flow_of] + (offset if paths_by_lane else 0)
    return lanes


def _dependents(rows: np.ndarray, flows: Sequence[Flow]) -> np.ndarray:
    """For each flow the flows that wait for it, as slices of one array."""
    waiting = [(before, i) for i, flow in enumerate(flows) for before in flow.after]
    waiting.sort()
    rows["dependents"] = np.bincount([before for before, _ in waiting], minlength=len(flows))[: len(flows)]
    rows["first_dependent"] = np.concatenate([[0], np.cumsum(rows["dependents"])[:-1]]) if len(flows) else 0
    return np.array([i for _, i in waiting], np.int32)
