"""What an operator watches, in Prometheus text form and as the small JSON of the page's live panel.

Each app has its own registry, so two apps in one process do not mix. Engine counters are read when somebody asks, not copied at every
step; only what the engine cannot see (times as a client feels them, HTTP statuses) is recorded here.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemel.engine.request import EngineStats
from gemel.llm.online import AsyncLLM

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
RATE_WINDOW_S = 3.0


class EngineCollector(Collector):
    """Reads the engine's counters at the moment of a scrape."""

    def __init__(self, llm: AsyncLLM):
        self.llm = llm

    def collect(self) -> Iterable[Metric]:
        """One family per number."""
        stats = self.llm.stats()
        yield GaugeMetricFamily(
            "gemel_healthy", "1 while the engine runs and takes requests", float(self.llm.healthy and not self.llm.draining)
        )
        yield GaugeMetricFamily("gemel_sequences_waiting", "sequences in the queue", stats.waiting)
        yield GaugeMetricFamily("gemel_sequences_running", "sequences that hold KV blocks", stats.running)
        yield GaugeMetricFamily("gemel_kv_blocks", "KV blocks in the pool", stats.blocks_total)
        yield GaugeMetricFamily("gemel_kv_blocks_used", "KV blocks that a sequence refers to", stats.blocks_used)
        yield GaugeMetricFamily("gemel_kv_blocks_cached", "KV blocks kept for reuse only", stats.blocks_cached)
        yield GaugeMetricFamily("gemel_kv_used_ratio", "used blocks over all blocks", stats.blocks_used / max(1, stats.blocks_total))
        yield CounterMetricFamily("gemel_engine_steps", "steps of the engine", stats.steps)
        yield CounterMetricFamily("gemel_prompt_tokens", "prompt tokens of admitted requests", stats.prompt_tokens)
        yield CounterMetricFamily("gemel_output_tokens", "tokens generated", stats.output_tokens)
        yield CounterMetricFamily("gemel_preemptions", "sequences that gave their blocks back to be computed again", stats.preemptions)
        yield CounterMetricFamily("gemel_prefix_hit_tokens", "prompt tokens found in the prefix cache", stats.prefix_hit_tokens)
        misses = CounterMetricFamily("gemel_prefix_miss_tokens", "prompt tokens that had to be computed, by reason", labels=["reason"])
        for reason, count in stats.prefix_misses.items():
            misses.add_metric([reason], count)
        yield misses
        finished = CounterMetricFamily("gemel_outputs_finished", "outputs, by how they ended", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """Everything that is counted for one app."""

    def __init__(self, llm: AsyncLLM, paths: frozenset[str]):
        self.llm, self.paths = llm, paths
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(llm))
        self._ttft = Histogram(
            "gemel_time_to_first_token_seconds",
            "from the arrival of a request to its first token",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "gemel_time_per_output_token_seconds",
            "mean time between the tokens of an output after its first",
            buckets=_PER_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._responses = Counter("gemel_http_responses", "HTTP responses", ["path", "status"], registry=self.registry)
        self._recent_ttft_s: deque[float] = deque(maxlen=20)
        self._recent_tokens: deque[tuple[float, int]] = deque()

    def saw_first_token(self, ttft_s: float) -> None:
        """A request got its first token `ttft_s` after it arrived."""
        self._ttft.observe(ttft_s)
        self._recent_ttft_s.append(ttft_s)

    def saw_output(self, per_token_s: float) -> None:
        """An output ended whose tokens came `per_token_s` apart on average."""
        self._per_token.observe(per_token_s)

    def saw_response(self, path: str, status: int) -> None:
        """A response was sent. Paths that are no route share one label: a scanner must not fill memory."""
        self._responses.labels(path if path in self.paths else "other", str(status)).inc()

    def text(self) -> bytes:
        """Prometheus exposition."""
        return generate_latest(self.registry)

    def panel(self) -> dict[str, float | int | None]:
        """The numbers of the live panel. Rates are over the last few seconds in which somebody looked."""
        stats = self.llm.stats()
        looked_up = stats.prefix_hit_tokens + sum(stats.prefix_misses.values())
        return {
            "waiting": stats.waiting,
            "running": stats.running,
            "blocks_used": stats.blocks_used,
            "blocks_cached": stats.blocks_cached,
            "blocks_total": stats.blocks_total,
            "prefix_hit_rate": stats.prefix_hit_tokens / looked_up if looked_up else None,
            "output_tokens": stats.output_tokens,
            "output_tokens_per_s": self._rate(stats),
            "ttft_s": statistics.median(self._recent_ttft_s) if self._recent_ttft_s else None,
            "preemptions": stats.preemptions,
        }

    def _rate(self, stats: EngineStats) -> float:
        now_s = time.perf_counter()
        self._recent_tokens.append((now_s, stats.output_tokens))
        while len(self._recent_tokens) > 2 and self._recent_tokens[1][0] < now_s - RATE_WINDOW_S:
            self._recent_tokens.popleft()
        then_s, then_tokens = self._recent_tokens[0]
        if now_s - then_s > 4 * RATE_WINDOW_S or now_s == then_s:
            return 0.0
        return (stats.output_tokens - then_tokens) / (now_s - then_s)
