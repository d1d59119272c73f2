"""Numbers as people read them."""

from __future__ import annotations


def count(n: float) -> str:
    """12_345_678 → '12.3M'."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{suffix}"
    return f"{n:.3g}" if isinstance(n, float) else str(n)


def bytes_(n: float) -> str:
    """Decimal bytes: 1_500_000_000 → '1.5 GB' (GB = 10⁹)."""
    for size, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= size:
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
