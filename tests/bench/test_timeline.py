"""Figures against values worked out by hand."""

import pytest

from gemel.bench.timeline import Span, Timeline, decode, percentile, prefill, throughput


def test_percentile_is_a_value_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, fraction) for fraction in (0.0, 0.2, 0.5, 0.99, 1.0)] == [1.0, 1.0, 3.0, 5.0, 5.0]
    assert percentile([7.0], 0.5) == 7.0


def test_throughput():
    spans = (Span(10, 5, 1.0, 2.0), Span(30, 1, 3.0, 3.0, cached_tokens=20), Span(10, 3, 0.5, 4.0))
    assert throughput(Timeline(spans, num_steps=7, num_preemptions=2)) == {
        "output_tokens_per_s": 9 / 4,
        "total_tokens_per_s": 59 / 4,
        "total_s": 4.0,
        "ttft_p50_s": 1.0,
        "ttft_p99_s": 3.0,
        "prefix_hit_tokens": 20.0,
        "prefix_hit_rate": 0.4,
        "preemptions": 2.0,
        "steps": 7.0,
        "token_p50_s": 0.25,
        "token_p99_s": 1.75,
    }


def test_a_single_token_has_no_time_between_tokens():
    assert "token_p50_s" not in throughput(Timeline((Span(4, 1, 1.0, 1.0),), 1, 0))


def test_decode_leaves_prefill_out():
    assert decode(Timeline((Span(128, 5, 9.0, 10.0),), 5, 0)) == {"decode_tokens_per_s": 4.0, "token_s": 0.25, "ttft_s": 9.0}


def test_prefill_counts_prompt_tokens():
    assert prefill(Timeline((Span(512, 1, 0.5, 0.5),), 1, 0)) == {"prefill512_tokens_per_s": 1024.0, "prefill512_ttft_s": 0.5}


def test_one_stream_figures_refuse_two_streams():
    with pytest.raises(ValueError, match="unpack"):
        decode(Timeline((Span(1, 2, 0.1, 0.2), Span(1, 2, 0.1, 0.2)), 2, 0))
