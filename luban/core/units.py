"""Numbers as people read them."""

from __future__ import annotations

import re

from luban.core.errors import ConfigError

NEARLY = 0.9995  # of a unit: three digits of less are none of it yet, as 999 MB
SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def count(n: float) -> str:
    """12_345_678 → '12.3M'."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= NEARLY * size:
            return f"{n / size:.3g}{suffix}"
    return f"{n:.3g}" if isinstance(n, float) else str(n)


def counted(n: int, what: str, several: str = "") -> str:
    """1 → '1 worker', 12_345 → '12,345 workers'; `several` is a plural that isn't formed by an s."""
    return f"{n:,} {what if n == 1 else several or what + 's'}"


def bytes_(n: float) -> str:
    """Decimal bytes: 1_500_000_000 → '1.5 GB' (GB = 10⁹)."""
    for size, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= NEARLY * size:
            return f"{n / size:.3g} {suffix}"
    return f"{int(n)} B"


def seconds(s: float) -> str:
    """3725 → '1h02m', 65 → '1m05s', 4.2 → '4.2s'."""
    if s < 60:
        return f"{s:.1f}s"
    if s < 3600:
        return f"{int(s // 60)}m{int(s % 60):02d}s"
    return f"{int(s // 3600)}h{int(s % 3600 // 60):02d}m"


def milliseconds(s: float) -> str:
    """1.2345 → '1,234 ms', 0.0123 → '12.3 ms'."""
    return f"{1e3 * s:,.0f} ms" if s >= 0.1 else f"{1e3 * s:.3g} ms"


def fine_seconds(s: float) -> str:
    """0.0012345 → '1.234 ms', down to nanoseconds."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if s >= size:
            return f"{s / size:.4g} {unit}"
    return f"{s * 1e9:.4g} ns"


def rate(gbps: float) -> str:
    """85.24 → '85.24 Gb/s', 112300 → '112.3 Tb/s'."""
    for size, unit in ((1e6, "Pb/s"), (1e3, "Tb/s"), (1.0, "Gb/s")):
        if gbps >= size:
            return f"{gbps / size:.4g} {unit}"
    return f"{gbps * 1e3:.4g} Mb/s"


def share_or_size(name: str, text: str) -> tuple[float | None, float | None]:
    """A share as a fraction, or a size in bytes; the other is None: '50%' → (0.5, None), '2GB' → (None, 2e9).

    Raises:
        ConfigError: the text is neither, or not above 0; `name` is that of the setting.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[kmgt]?b?)\s*", text.lower())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{name} is a share such as 50% or a size such as 2GB, not {text!r}")
    value, unit = float(match[1]), match[2]
    return (value / 100, None) if unit == "%" else (None, value * SIZES[unit.removesuffix("b")])
