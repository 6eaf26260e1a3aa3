"""The plan's arithmetic against counting by hand and against brute force."""

import pytest

from gemel.bench.roofline import Rates, StepCost, _keys_read, _pairs
from gemel.config.model import GELU, ModelConfig
from gemel.engine.request import Request, Scheduled, Sequence, StepPlan

CONFIG = ModelConfig(
    family="llama",
    num_layers=2,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_width=2,
    ffn_width=16,
    vocab_size=32,
    max_positions=64,
    tied_head=True,
)
INSTANT = 1e30


def scheduled(start, num_new, samples=False):
    sequence = Sequence(Request("a", (0,) * 64), 0, 0, [0] * 64, 64)
    return Scheduled(sequence, start, num_new, samples)


def plan(*work):
    return StepPlan(work, (), ())


def test_weights_are_counted():
    # per layer: q and o 8x8 each, k and v 8x4 each, three feed-forward matrices of 8x16
    body = 2 * (64 + 64 + 32 + 32 + 3 * 128)
    cost = StepCost(CONFIG, 2, Rates(1.0, 1.0))
    assert (cost.body_weights, cost.head_weights) == (body, 256)
    assert cost.weight_bytes == 2 * (body + 256)
    assert cost.kv_bytes_per_token == 2 * 2 * 2 * 2 * 2
    untied = StepCost(CONFIG.model_copy(update={"tied_head": False, "ffn": GELU()}), 4, Rates(1.0, 1.0))
    assert untied.weight_bytes == 4 * (body - 2 * 128 + 512)


def test_decoding_is_bound_by_bytes():
    cost = StepCost(CONFIG, 2, Rates(1.0, INSTANT))
    step = plan(scheduled(9, 1, samples=True), scheduled(19, 1, samples=True))
    assert cost.step_s(step) == (cost.body_weights + cost.head_weights) * 2 + cost.kv_bytes_per_token * (10 + 20)


def test_prefill_is_bound_by_flops_and_only_the_last_row_meets_the_head():
    cost = StepCost(CONFIG, 2, Rates(INSTANT, 1.0))
    pairs = sum(range(5, 13))  # positions 4..11 see 5..12 keys
    attention = 2 * 4 * 4 * 2 * pairs
    assert cost.step_s(plan(scheduled(4, 8))) == 2 * cost.body_weights * 8 + attention
    assert cost.step_s(plan(scheduled(4, 8, samples=True))) == 2 * cost.body_weights * 8 + 2 * cost.head_weights + attention


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("start", "num_new"), [(0, 1), (0, 9), (5, 1), (2, 4), (20, 6)])
def test_attention_counts_match_brute_force(start, num_new, window):
    seen = [set(range(max(0, p + 1 - window) if window else 0, p + 1)) for p in range(start, start + num_new)]
    item = scheduled(start, num_new)
    assert _pairs(item, window) == sum(len(keys) for keys in seen)
    assert _keys_read(item, window) == len(set().union(*seen))


def test_windows_make_attention_cheaper_layer_by_layer():
    step = plan(scheduled(40, 1))
    rates = Rates(1.0, INSTANT)
    full = StepCost(CONFIG, 2, rates).step_s(step)
    half = StepCost(CONFIG.model_copy(update={"windows": (None, 8)}), 2, rates).step_s(step)
    assert full - half == (41 - 8) * StepCost(CONFIG, 2, rates).kv_bytes_per_token / 2
