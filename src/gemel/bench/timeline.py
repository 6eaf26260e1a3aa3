"""When tokens came, and the figures that follow from it. The engine and the simulation both produce a `Timeline`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One job's life in seconds since all jobs were added. `cached_tokens` of its prompt came from the prefix cache."""

    num_prompt: int
    num_output: int
    first_s: float
    last_s: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans in the order of the jobs, how many engine steps they took, and how many times a sequence was preempted."""

    spans: tuple[Span, ...]
    num_steps: int
    num_preemptions: int

    @property
    def total_s(self) -> float:
        """Seconds until the last token of the last job."""
        return max(span.last_s for span in self.spans)


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed (nearest rank: it is always one that occurred)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(fraction * len(ordered)) - 1, 0)]


def throughput(timeline: Timeline) -> dict[str, float]:
    """Figures of many jobs at once. Rates are tokens per second, `_s` are seconds."""
    spans = timeline.spans
    num_prompt = sum(span.num_prompt for span in spans)
    num_cached = sum(span.cached_tokens for span in spans)
    per_token_s = [(span.last_s - span.first_s) / (span.num_output - 1) for span in spans if span.num_output > 1]
    figures = {
        "output_tokens_per_s": sum(span.num_output for span in spans) / timeline.total_s,
        "total_tokens_per_s": sum(span.num_prompt + span.num_output for span in spans) / timeline.total_s,
        "total_s": timeline.total_s,
        "ttft_p50_s": percentile([span.first_s for span in spans], 0.50),
        "ttft_p99_s": percentile([span.first_s for span in spans], 0.99),
        "prefix_hit_tokens": float(num_cached),
        "prefix_hit_rate": num_cached / num_prompt,
        "preemptions": float(timeline.num_preemptions),
        "steps": float(timeline.num_steps),
    }
    if per_token_s:
        figures["token_p50_s"] = percentile(per_token_s, 0.50)
        figures["token_p99_s"] = percentile(per_token_s, 0.99)
    return figures


def decode(timeline: Timeline) -> dict[str, float]:
    """Figures of a single stream: the rate counts from the first token on, so that prefill does not enter it."""
    (span,) = timeline.spans
    token_s = (span.last_s - span.first_s) / (span.num_output - 1)
    return {"decode_tokens_per_s": 1.0 / token_s, "token_s": token_s, "ttft_s": span.first_s}


def prefill(timeline: Timeline) -> dict[str, float]:
    """Figures of a single prompt: everything until the first output token."""
    (span,) = timeline.spans
    return {f"prefill{span.num_prompt}_tokens_per_s": span.num_prompt / span.first_s, f"prefill{span.num_prompt}_ttft_s": span.first_s}
