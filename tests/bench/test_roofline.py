"""The plan's arithmetic against counting by hand and against brute force."""

from dataclasses import replace

import pytest

from gemel.bench.roofline import WEIGHTS, Rates, StepCost, _keys_read, _pairs, uniform
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


def rates(read_bytes_per_s, flops_per_s):
    return Rates(read_bytes_per_s, dict.fromkeys(("float32", "bfloat16", "int8"), flops_per_s))


def cost(read_bytes_per_s=1.0, flops_per_s=1.0, config=CONFIG):
    return StepCost(config, uniform(config, "bfloat16", 2, "bfloat16"), rates(read_bytes_per_s, flops_per_s), block_tokens=16)


def scheduled(start, num_new, samples=False, blocks=()):
    sequence = Sequence(Request("a", (0,) * 64), 0, 0, [0] * 64, 64)
    sequence.blocks = list(blocks)
    return Scheduled(sequence, start, num_new, samples)


def plan(*work):
    return StepPlan(work, (), ())


# per layer: q and o 8x8 each, k and v 8x4 each, three feed-forward matrices of 8x16
BODY = 2 * (64 + 64 + 32 + 32 + 3 * 128)
HEAD = 256


def test_weights_are_counted():
    storage = uniform(CONFIG, "bfloat16", 2, "bfloat16")
    assert {name: matrices.num_weights for name, matrices in storage.products.items()} == {
        "qkv": 2 * 128,
        "out": 2 * 64,
        "gate_up": 2 * 256,
        "down": 2 * 128,
        "head": HEAD,
    }
    assert storage.weight_bytes == 2 * (BODY + HEAD)
    assert storage.kv_bytes_per_token == 2 * 2 * 2 * 2 * 2
    untied = uniform(CONFIG.model_copy(update={"tied_head": False, "ffn": GELU()}), "float32", 4, "float32")
    assert untied.weight_bytes == 4 * (BODY - 2 * 128 + 512)


@pytest.mark.parametrize(
    ("weights", "num_bytes"),
    # 10 rows of 64: numbers, then fp32 scales of rows, or fp16 scales of two groups of 32 in each
    [("float32", 2560), ("bfloat16", 1280), ("int8", 640 + 10 * 4), ("int4", 320 + 10 * 2 * 2)],
)
def test_formats_take_their_scales_with_them(weights, num_bytes):
    assert WEIGHTS[weights].bytes(10, 64) == num_bytes


def test_decoding_is_bound_by_bytes():
    decode, step = cost(1.0, INSTANT), plan(scheduled(9, 1, samples=True), scheduled(19, 1, samples=True))
    assert decode.step_s(step) == (BODY + HEAD) * 2 + decode.storage.kv_bytes_per_token * (10 + 20)
    assert decode.parts_s(step) == decode.parts_bytes(step)
    assert list(decode.parts_s(step)) == ["qkv", "attention", "out", "gate_up", "down", "head"]


def test_prefill_is_bound_by_flops_and_only_the_last_row_meets_the_head():
    prefill = cost(INSTANT, 1.0)
    pairs = sum(range(5, 13))  # positions 4..11 see 5..12 keys
    attention = 2 * 4 * 4 * 2 * pairs
    assert prefill.step_s(plan(scheduled(4, 8))) == 2 * BODY * 8 + attention
    assert prefill.step_s(plan(scheduled(4, 8, samples=True))) == 2 * BODY * 8 + 2 * HEAD + attention
    assert prefill.parts_bytes(plan(scheduled(4, 8)))["head"] == 0


def test_every_part_has_the_peak_of_its_own_arithmetic():
    storage = uniform(CONFIG, "int8", 2, "int8")
    mixed = StepCost(CONFIG, replace(storage, kv_arithmetic="float32"), Rates(INSTANT, {"int8": 4.0, "float32": 1.0}), 16)
    parts = mixed.parts_s(plan(scheduled(0, 1)))
    assert parts["down"] == 2 * (2 * 128) / 4
    assert parts["attention"] == 2 * 4 * 4 * 2


def test_blocks_that_sequences_share_are_read_once():
    shared, read = [7, 8], cost(1.0, INSTANT)
    together = plan(scheduled(40, 1, blocks=[*shared, 1]), scheduled(40, 1, blocks=[*shared, 2]), scheduled(20, 1, blocks=[7, 3]))
    apart = plan(scheduled(40, 1, blocks=[4, 5, 1]), scheduled(40, 1, blocks=[6, 9, 2]), scheduled(20, 1, blocks=[10, 3]))
    saved = read.parts_bytes(apart)["attention"] - read.parts_bytes(together)["attention"]
    assert saved == (2 + 1) * 16 * read.storage.kv_bytes_per_token


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("start", "num_new"), [(0, 1), (0, 9), (5, 1), (2, 4), (20, 6)])
def test_attention_counts_match_brute_force(start, num_new, window):
    seen = [set(range(max(0, p + 1 - window) if window else 0, p + 1)) for p in range(start, start + num_new)]
    item = scheduled(start, num_new)
    assert _pairs(item, window) == sum(len(keys) for keys in seen)
    assert _keys_read(item, window) == len(set().union(*seen))


def test_windows_make_attention_cheaper_layer_by_layer():
    step, full = plan(scheduled(40, 1)), cost(1.0, INSTANT)
    half = cost(1.0, INSTANT, CONFIG.model_copy(update={"windows": (None, 8)}))
    assert full.step_s(step) - half.step_s(step) == (41 - 8) * full.storage.kv_bytes_per_token / 2
