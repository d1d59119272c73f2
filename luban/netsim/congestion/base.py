"""Transports: what every algorithm's configuration has, and the names under which they are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.netsim.congestion.parameters import BYTES_A_PS
from luban.netsim.engine.layout import CC_PARAMS

Recovery = Literal["go_back_n", "newreno", "selective"]
Routing = Literal["ecmp", "spray", "round_robin", "per_path", "adaptive"]

_AT = "luban.netsim.congestion."
MOST_PATHS = 250  # of a flow: a byte a packet holds the path that it is on


@dataclass(frozen=True, kw_only=True)
class Transport(Variant):
    """How hosts send: packet sizes, loss recovery, paths, and the congestion control that a subclass names."""

    registry: ClassVar[Registry] = Registry(
        "transport",
        {
            "constant": _AT + "constant:Constant",
            "newreno": _AT + "newreno:NewReno",
            "dctcp": _AT + "dctcp:Dctcp",
            "dcqcn": _AT + "dcqcn:Dcqcn",
            "dcqcn_paper": _AT + "dcqcn:DcqcnPaper",
            "timely": _AT + "timely:Timely",
            "patched_timely": _AT + "timely:PatchedTimely",
            "hpcc": _AT + "hpcc:Hpcc",
            "pint": _AT + "pint:Pint",
            "swift": _AT + "swift:Swift",
            "ufab": _AT + "ufab:Ufab",
            "solar": _AT + "solar:Solar",
        },
    )
    code: ClassVar[int]  # of the algorithm
    telemetry: ClassVar[int] = 0  # what switches write into its packets: nothing, INT, PINT
    shares_by_weight: ClassVar[bool] = False  # whether bandwidth is in proportion to the flows' weights

    payload: int = 1000  # bytes of data a packet
    header: int = 48  # bytes of headers a data packet
    ack_size: int = 64  # bytes of an acknowledgement on the wire
    ack_priority: bool = True  # acknowledgements pass before data
    recovery: Recovery = "go_back_n"  # of lost packets
    reorder: int = 3  # selective: a packet is lost when one sent so many later has arrived; 0: only by timeout
    routing: Routing = (
        "ecmp"  # a path a flow, each packet any, in turn, paths controlled one by one, by the shortest queue
    )
    max_paths: int = 16  # of shortest paths, how many a flow chooses among
    rto_us: float = 4000.0  # smallest retransmission timeout, microseconds
    ack_every: int = 1  # packets an acknowledgement; not with selective recovery
    ack_delay_us: float = 200_000.0  # that an acknowledgement waits for the next packet at most, microseconds
    probe_us: float = 0.0  # per_path: after so long an ejected path is tried again, microseconds; 0: never
    segment_base: int = 8  # bytes of a segment-routing header
    segment_bytes: int = 8  # of each segment in it
    min_rate_mbps: float = 100.0  # lowest rate of algorithms that set one

    def __post_init__(self):
        for name in ("payload", "header", "ack_size", "max_paths"):
            if getattr(self, name) < 1:
                raise ConfigError(f"transport.{name} must be at least 1, {getattr(self, name)} given")
        if self.ack_every < 1 or (self.ack_every > 1 and self.recovery == "selective"):
            raise ConfigError(
                f"transport.ack_every {self.ack_every}: at least 1, and 1 where transport.recovery selective acknowledges every "
                f"packet by itself"
            )
        if not 0 <= self.segment_bytes <= 64 or not 0 <= self.segment_base <= 64:
            raise ConfigError("transport.segment_base and transport.segment_bytes must be from 0 to 64 bytes")
        if self.max_paths > MOST_PATHS:
            raise ConfigError(f"transport.max_paths must be at most {MOST_PATHS}, {self.max_paths} given")
        if self.ack_delay_us <= 0 or self.probe_us < 0:
            raise ConfigError("transport.ack_delay_us must be above 0, transport.probe_us at least 0")
        if self.rto_us <= 0 or self.min_rate_mbps <= 0:
            raise ConfigError("transport.rto_us and transport.min_rate_mbps must be above 0")
        if self.routing != "ecmp" and self.recovery != "selective":
            raise ConfigError(
                f"transport.routing {self.routing} lets packets arrive out of order, which transport.recovery "
                f"{self.recovery} takes for losses: use --transport.recovery selective --transport.reorder 0"
            )

    def require_share(self, name: str) -> None:
        """Raise ConfigError unless a field is above 0 and at most 1."""
        if not 0 < getattr(self, name) <= 1:
            raise ConfigError(f"transport.{name} must be above 0 and at most 1, {getattr(self, name)} given")

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """The algorithm's own parameters, in the order of its constants.

        Args:
            rate: of the host's port, Mb/s.
            base_rtt: ps.
        """
        return []

    def marks(self, rate: int) -> tuple[float, float, float]:
        """ECN at a port of `rate` Mb/s, where switches have no marks of their own: low and high bound in bytes (0 and 0: none),
        and the share that is marked just below the high one."""
        return 0.0, 0.0, 0.0

    def cnp_gap_us(self) -> float:
        """Microseconds between two congestion notifications to one sender; 0: every mark is echoed."""
        return 0.0

    def parameters(self, rate: float, base_rtt: float) -> list[float]:
        """The numbers of a record of `State.profiles`."""
        line = rate * BYTES_A_PS
        row = [line, base_rtt, line * base_rtt, float(self.payload), self.min_rate_mbps * BYTES_A_PS]
        row += self.own_parameters(rate, base_rtt)
        return row + [0.0] * (CC_PARAMS - len(row))
