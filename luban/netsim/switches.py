"""Switch configuration: buffer, flow control, marking, scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from luban.core.errors import ConfigError
from luban.netsim.engine.layout import CREDITS, LOSSY, PAUSE_FRAME, PFC

KINDS = {"lossy": LOSSY, "pfc": PFC, "credits": CREDITS}
BASE_SHIFT = 3  # a class of a port may use an eighth of the free shared buffer


@dataclass(frozen=True, kw_only=True)
class Switches:
    """All switches of a network."""

    flow_control: Literal["lossy", "pfc", "credits"] = "pfc"  # drop, pause as RoCE, or credits as InfiniBand
    buffer_bytes: int = 0  # shared by all ports; 0: 0.32 MB for each Gb/s of the fastest host port
    port_bytes: int = 0  # lossy: an egress queue holds so much at most; 0: the shared buffer decides
    alpha: float = 1.0  # lossy: an egress queue may hold alpha times the free buffer
    reserve_bytes: int = 4000  # pfc: for each class of an ingress port, never shared
    headroom_bytes: int = (
        0  # pfc: for what comes after a PAUSE; 0: 3·rate·delay, or what the cable needs where that is more
    )
    allow_small_headroom: bool = False  # run with a headroom that loses packets
    credit_bytes: int = (
        64_000  # credits: buffer of a class of an ingress port; inside of servers more where a link needs it
    )
    mark_low_bytes: int = 0  # ECN: below nothing is marked, at `mark_gbps`; 0 for both: as the transport needs it
    mark_high_bytes: int = 0  # ECN: above everything is marked
    mark_share: float = 1.0  # ECN: share that is marked just below mark_high_bytes
    mark_gbps: float = 0.0  # rate that the marks are meant for, scaled for others; 0: the same bytes at every rate
    mark_at: Literal["dequeue", "enqueue"] = "dequeue"  # whether ECN sees the queue left behind or the one found
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0)  # of the classes 1 to 3 in deficit round robin

    def __post_init__(self):
        if not self.mark_low_bytes <= self.mark_high_bytes:
            raise ConfigError(
                f"switch.mark_low_bytes {self.mark_low_bytes} is above mark_high_bytes {self.mark_high_bytes}"
            )
        if not 0 <= self.mark_share <= 1:
            raise ConfigError(f"switch.mark_share must be from 0 to 1, {self.mark_share} given")
        if len(self.class_weights) != 3 or min(self.class_weights) <= 0:
            raise ConfigError("switch.class_weights: three numbers above 0, for the classes 1, 2 and 3")

    def buffer(self, host_rate: int) -> int:
        """Bytes of buffer where the fastest host port has `host_rate` Mb/s."""
        return self.buffer_bytes or round(16 * host_rate / 1000 / 50 * 1e6)

    def needed_headroom(self, rate: int, delay: int, packet: int) -> int:
        """Bytes that can arrive after a PAUSE was decided on: both ways of the cable, a packet that the PAUSE waits for, one that
        was just begun at the far end, and the frame itself.

        Args:
            rate: of the link, Mb/s.
            delay: of the cable, ps.
            packet: bytes of the largest packet.
        """
        return -(-2 * delay * rate // 8_000_000) + 2 * packet + PAUSE_FRAME

    def headroom(self, rate: int, delay: int, packet: int, where: str) -> int:
        """Bytes of headroom of a class at the end of a link.

        Raises:
            ConfigError: the configured one is too small for the cable; the message has the number needed.
        """
        needed = self.needed_headroom(rate, delay, packet)
        given = self.headroom_bytes or max(3 * delay * rate // 8_000_000, needed)
        if given < needed and not self.allow_small_headroom:
            raise ConfigError(
                f"switch.headroom_bytes {given} is too small for {where} ({rate / 1000:g} Gb/s, {delay / 1e6:g} µs): packets "
                f"would be lost after a PAUSE; {needed} are needed"
            )
        return given

    def inside_credits(self, rate: int, delay: int, packet: int) -> int:
        """Bytes of credit of a class at a switch inside of a server: enough for the link to go on sending while credit comes back,
        which is returned an eighth of it at a time. Arguments as of `needed_headroom`."""
        return max(self.credit_bytes, 3 * delay * rate // 8_000_000 + 4 * packet)

    def shift(self, rate: int, host_rate: int) -> int:
        """Power of two below the free shared buffer of a class's threshold: 3, one less for each doubling of the port's rate
        over the hosts'."""
        shift = BASE_SHIFT
        while rate > host_rate and shift > 0:
            rate, shift = rate // 2, shift - 1
        return shift

    def marks(self, rate: int, default: tuple[float, float, float]) -> tuple[int, int, float]:
        """ECN's bounds in bytes and share for a port of `rate` Mb/s; `default` is the transport's for that rate."""
        if not self.mark_high_bytes:
            low, high, share = default
            return round(low), round(high), share
        scale = rate / (1000 * self.mark_gbps) if self.mark_gbps else 1.0
        return round(self.mark_low_bytes * scale), round(self.mark_high_bytes * scale), self.mark_share
