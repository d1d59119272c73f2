"""Send a load to a server and summarise what it took."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luban.serve.bench.client import Server, Timed
from luban.serve.bench.workload import Planned

SHARES = (50, 95, 99)  # percentiles


@dataclass(frozen=True)
class Row:
    """A load and how it was served; latencies in milliseconds by percentile."""

    rate: float  # requests a second asked for; infinite: all at once
    requests: int  # answered
    failed: int
    seconds: float  # from the first request to the last answer
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token: dict[int, float]  # from sending to the first text
    between_tokens: dict[int, float]  # between texts of an answer
    whole: dict[int, float]  # from sending to the end

    @property
    def served_rate(self) -> float:
        """Requests answered a second."""
        return self.requests / self.seconds


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Nearest-rank percentiles, in thousandths; NaN where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(SHARES, math.nan)
    return {share: 1000 * ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] for share in SHARES}


def send(server: Server, planned: Iterable[Planned], concurrency: int) -> list[Timed]:
    """Send requests at their times, each in a thread, at most `concurrency` at once; returns what became of them."""
    found: list[Timed] = []
    free, threads, began = threading.Semaphore(concurrency), [], time.perf_counter()

    def one(request: Planned) -> None:
        try:
            found.append(server.complete(request.prompt, request.max_tokens))
        finally:
            free.release()

    for request in planned:
        time.sleep(max(0.0, began + request.at - time.perf_counter()))
        free.acquire()
        threads.append(threading.Thread(target=one, args=(request,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return found


def summary(rate: float, timed: Sequence[Timed]) -> Row:
    """A row of the table."""
    whole = [each for each in timed if each.error is None and each.arrivals]
    seconds = max((each.ended for each in timed), default=0.0) - min((each.sent for each in timed), default=0.0)
    seconds = max(seconds, 1e-9)
    return Row(
        rate=rate,
        requests=len(whole),
        failed=len(timed) - len(whole),
        seconds=seconds,
        prompt_tokens_per_s=sum(each.prompt_tokens for each in whole) / seconds,
        output_tokens_per_s=sum(each.output_tokens for each in whole) / seconds,
        first_token=percentiles([each.arrivals[0] - each.sent for each in whole]),
        between_tokens=percentiles([b - a for each in whole for a, b in itertools.pairwise(each.arrivals)]),
        whole=percentiles([each.ended - each.sent for each in whole]),
    )


HEAD = (
    "requests/s",
    "served/s",
    "failed",
    "output tok/s",
    "prompt tok/s",
    "first token ms p50",
    "p95",
    "p99",
    "between tokens ms p50",
    "p95",
    "p99",
)


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    cells: list[list[str]] = [list(HEAD)]
    for row in rows:
        latencies = [f"{value:,.1f}" for part in (row.first_token, row.between_tokens) for value in part.values()]
        cells.append(
            [
                "all at once" if math.isinf(row.rate) else f"{row.rate:g}",
                f"{row.served_rate:,.2f}",
                str(row.failed),
                f"{row.output_tokens_per_s:,.1f}",
                f"{row.prompt_tokens_per_s:,.1f}",
                *latencies,
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)
