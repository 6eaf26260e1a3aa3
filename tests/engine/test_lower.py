"""Lowered programs: what a native step computes is what the modules compute in torch, and a row is the same bits in any company."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.config.sampling import SamplingParams
from gemel.engine import lower
from gemel.engine.engine import Engine
from gemel.engine.lower import NativeStep
from gemel.engine.request import Request
from gemel.model.build import LoadedModel
from gemel.model.leaves.linear import replace
from gemel.model.leaves.lowbit import LowBitLinear, quantize
from gemel.model.leaves.native import NativeLinear
from gemel.ops.cpu import native
from gemel.ops.cpu.program import Stretch
from tests import tiny
from tests.engine.test_parity import naive_greedy, packed_logits, run
from tests.tolerance import assert_close

KINDS = list(tiny.CONFIGS)
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native.find()[0] is None, reason=native.find()[1])


def low_bit(loaded: LoadedModel, bits: int, group: int, activations: str) -> LoadedModel:
    replace(loaded.model, "*", lambda leaf: LowBitLinear(quantize(leaf.weight, bits, group), leaf.bias, leaf.sections, activations))
    return loaded


def native_logits(loaded: LoadedModel, docs: list[list[int]], chunks: list[int], kv: str = "float32", threads: int = 2) -> torch.Tensor:
    """Logits of every position: each document in its own scattered blocks, advancing by chunks of the given sizes, again and again."""
    step = NativeStep(loaded.model, 64, 16, kv, threads)
    blocks = random.Random(0).sample(range(64), 64)
    tables = [[blocks.pop() for _ in range(-(-len(doc) // 16))] for doc in docs]
    done = [0] * len(docs)
    out: list[list[torch.Tensor]] = [[] for _ in docs]
    for chunk in itertools.cycle(chunks):
        work = [(i, done[i], min(chunk, len(doc) - done[i])) for i, doc in enumerate(docs) if done[i] < len(doc)]
        if not work:
            break
        tokens = np.array([t for i, start, num in work for t in docs[i][start : start + num]], np.int32)
        positions = np.array([p for _, start, num in work for p in range(start, start + num)], np.int32)
        stretches = [Stretch(start, num, tables[i]) for i, start, num in work]
        logits, largest, argmax = step.program.run(tokens, positions, stretches, np.arange(len(tokens), dtype=np.int32))
        assert (largest == logits.max(-1)).all() and (argmax == logits.argmax(-1)).all()
        first = 0
        for i, _, num in work:
            out[i].append(torch.from_numpy(logits[first : first + num].copy()))
            done[i] += num
            first += num
    return torch.cat(list(itertools.chain(*out)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[1], [3, 1, 1], [50]])
@torch.inference_mode()
def test_lowered_equals_torch(kind: str, chunks: list[int]) -> None:
    docs = tiny.documents(23, 5, 41, 1, 12, 30)
    want = packed_logits(tiny.build(kind), docs)
    assert_close(native_logits(tiny.build(kind), docs, chunks), want, "fp32_reorder")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_bf16_weights_and_pages_are_near_fp32(kind: str) -> None:
    docs = tiny.documents(23, 5, 41)
    loaded = tiny.build(kind)
    loaded.model.bfloat16()
    want = packed_logits(LoadedModel(tiny.build(kind).model, loaded.config, loaded.path, (), None), docs)
    assert_close(native_logits(loaded, docs, [7], "bfloat16"), want, "bf16_reorder")


LOW_BIT = [(8, 0, "full"), (8, 0, "int8"), (4, 32, "full"), (4, 32, "int8")]


@pytest.mark.parametrize(("bits", "group", "activations"), LOW_BIT)
@pytest.mark.parametrize("kind", ["gqa", "learned"])
@torch.inference_mode()
def test_low_bit_leaves_compute_what_their_torch_form_does(kind: str, bits: int, group: int, activations: str) -> None:
    docs = tiny.documents(23, 5, 41)
    want = packed_logits(low_bit(tiny.build(kind, ffn_width=64), bits, group, activations), docs)
    got = native_logits(low_bit(tiny.build(kind, ffn_width=64), bits, group, activations), docs, [9])
    assert_close(got, want, "fp32_reorder" if activations == "full" else "int8_activations")


FORMS = [("float32", "float32", None), ("bfloat16", "bfloat16", None), ("float32", "int8", None)] + [
    ("float32", "bfloat16", form) for form in LOW_BIT
]


@pytest.mark.parametrize(("dtype", "kv", "form"), FORMS)
@torch.inference_mode()
def test_a_row_is_the_same_bits_in_any_company(dtype: str, kv: str, form: tuple[int, int, str] | None) -> None:
    """Alone or among others, in chunks or token by token, on one thread or two."""

    def build() -> LoadedModel:
        loaded = tiny.build("gqa", ffn_width=64)
        loaded.model.to(getattr(torch, dtype))
        return low_bit(loaded, *form) if form else loaded

    docs = tiny.documents(140, 3, 41, 1, 17)
    alone = torch.cat([native_logits(build(), [doc], [1], kv, threads=1) for doc in docs])
    assert_close(native_logits(build(), docs, [64, 1, 5], kv), alone, "exact")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_blocks", "prefix_cache"), [(None, False), (None, True), (8, True)])
def test_engine_greedy_equals_naive_greedy(kind: str, num_blocks: int | None, prefix_cache: bool) -> None:
    shared, *tails = tiny.documents(37, 4, 9, 1, 17)
    prompts = [shared + tail for tail in tails] + [shared + tails[0], tails[3]]
    config = EngineConfig(
        dtype="float32",
        kernels="native",
        max_context=128,
        max_running=8,
        max_step_tokens=16,
        prefix_cache=prefix_cache,
        kv_bytes=num_blocks and num_blocks * NativeStep.bytes_per_block(tiny.CONFIGS[kind], 16, "float32"),
    )
    engine = Engine(tiny.build(kind), config)
    assert engine.runner.native
    params = SamplingParams(temperature=0.0, max_tokens=30)
    tokens = run(engine, [Request(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)])
    loaded = tiny.build(kind)
    for i, prompt in enumerate(prompts):
        assert tokens[str(i), 0] == naive_greedy(loaded, prompt, 30)
    stats = engine.stats()
    ends_early = kind == "qk_norm"  # these random weights reach the end token before the blocks run out
    assert (stats.preemptions > 0) == (num_blocks is not None and not ends_early)
    assert (stats.prefix_hit_tokens > 0) == prefix_cache


def test_two_engines_of_one_process_do_not_disturb_each_other() -> None:
    """Each has threads of its own, and both are in the middle of their steps at once."""
    docs = [list(range(1, 40)), list(range(5, 30))]
    alone = [native_logits(tiny.build(seed=seed), docs, [3, 1]) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            together = pool.map(lambda seed: native_logits(tiny.build(seed=seed), docs, [3, 1]), (0, 1))
            assert all(torch.equal(got, want) for got, want in zip(together, alone, strict=True))
    assert not torch.equal(*alone)


@torch.inference_mode()
def test_a_logit_that_is_not_finite_is_reported_for_its_row_alone() -> None:
    loaded = tiny.build("gqa")
    loaded.model.embed.weight[5] = float("nan")
    step = NativeStep(loaded.model, 8, 16, "float32", 2)
    tokens, positions = np.array([5, 6], np.int32), np.array([0, 0], np.int32)
    _, largest, _ = step.program.run(tokens, positions, [Stretch(0, 1, [0]), Stretch(0, 1, [1])], np.array([0, 1], np.int32))
    assert np.isnan(largest).tolist() == [True, False]


def test_weights_exist_once_and_can_be_read_back() -> None:
    loaded, again = tiny.build("gqa").model, tiny.build("gqa").model
    NativeStep(loaded, 8, 16, "float32", 1)
    for name, leaf in loaded.named_modules():
        if isinstance(leaf, NativeLinear):
            assert torch.equal(leaf.plain(), again.get_submodule(name).weight)
    assert not any("qkv" in name or "down" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": "torch"}, "kernels = 'torch'"),
        ({"block_tokens": 8}, "block_tokens is 8"),
    ],
)
def test_what_cannot_be_lowered_is_named(changes: dict[str, object], said: str) -> None:
    config = EngineConfig.parse({"dtype": "float32", **changes})
    assert said in (lower.reason(tiny.CONFIGS["gqa"], config, CPU, torch.float32) or "")
    assert not Engine(tiny.build("gqa"), config).runner.native


def test_asking_for_what_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ConfigError, match="block_tokens is 8"):
        Engine(tiny.build("gqa"), EngineConfig(dtype="float32", kernels="native", block_tokens=8))
