"""What Prometheus reads at /metrics. Counted where answers are written, outside of the engine's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from luban.serve.batch import BatchLoad
from luban.serve.request import Delta, Request

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The figures of one server.

    Args:
        load: what the engine holds now; None while there is none.
    """

    def __init__(self, load: Callable[[], BatchLoad | None]):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(load))
        within: dict[str, Any] = {"registry": self.registry, "namespace": "luban"}
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=FIRST_TOKEN, **within
        )
        self.between_tokens = Histogram(
            "inter_token_latency_seconds", "Between an answer's tokens.", buckets=BETWEEN_TOKENS, **within
        )
        self.whole = Histogram(
            "request_duration_seconds", "From a request's arrival to its last token.", buckets=WHOLE, **within
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **within)
        self.generated_tokens = Counter("generation_tokens", "Tokens generated.", **within)
        self.ended = Counter("requests_finished", "Answers by why they ended.", ["reason"], **within)
        self.refused = Counter("requests_refused", "Requests refused as the queue was full.", **within)

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class Timing:
    """Watches the answers to one HTTP request."""

    def __init__(self, metrics: Metrics, requests: list[Request]):
        self.metrics, self.began, self.last = metrics, time.perf_counter(), {}
        self.first: float | None = None  # seconds to the first token
        self.requests, self.ended = requests, set[tuple[int, int]]()  # the answers that have ended
        metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))

    def delta(self, index: int, delta: Delta) -> None:
        """A delta of request `index` has come."""
        now, answer = time.perf_counter(), (index, delta.choice)
        if answer in self.last:
            self.metrics.between_tokens.observe((now - self.last[answer]) / max(1, len(delta.token_ids)))
        else:
            self.metrics.first_token.observe(now - self.began)
            self.first = self.first if self.first is not None else now - self.began
        self.last[answer] = now
        self.metrics.generated_tokens.inc(len(delta.token_ids))
        if delta.finish_reason:
            self.ended.add(answer)
            self.metrics.ended.labels(delta.finish_reason).inc()
            self.metrics.whole.observe(now - self.began)

    def close(self) -> None:
        """No more deltas come: answers that have not ended were cancelled, such as those to a client that has left."""
        left = sum(len(request.result.choices) for request in self.requests) - len(self.ended)
        self.metrics.ended.labels("cancelled").inc(max(left, 0))


class _Engine:
    """Figures that are read off the engine when they are asked for."""

    def __init__(self, load: Callable[[], BatchLoad | None]):
        self.load = load

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        load = self.load() or BatchLoad(0, 0, 0.0)
        for name, help, value in (
            ("requests_running", "Sequences that hold memory.", load.running),
            ("requests_waiting", "Sequences that wait for memory.", load.waiting),
            ("kv_cache_usage_ratio", "Share of the KV cache that sequences hold.", load.cache_usage),
        ):
            yield GaugeMetricFamily(f"luban_{name}", help, value)
        for name, help, value in (
            ("prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.", load.prompt_tokens),
            ("prefix_cache_hits", "Of them found there.", load.prefix_hits),
            ("draft_tokens", "Tokens guessed by speculation.", load.drafted),
            ("accepted_tokens", "Of them kept.", load.accepted),
            ("preemptions", "Sequences that gave up their memory to others for a while.", load.preemptions),
            ("swaps", "Of them kept in host memory instead of being read again.", load.swaps),
        ):
            yield CounterMetricFamily(f"luban_{name}", help, value)
