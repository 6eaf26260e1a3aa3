"""Parity is law: whatever the engine does to a sequence, its logits and tokens are those of the packed forward of the whole text."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from gemel.config.engine import EngineConfig
from gemel.config.sampling import SamplingParams
from gemel.engine.attend import KVCache, PagedAttend
from gemel.engine.engine import Engine
from gemel.engine.request import Request, Scheduled, Sequence
from gemel.model.attend import PackedAttend
from gemel.model.build import LoadedModel
from gemel.model.leaves.prepacked import prepack
from tests import tiny
from tests.tolerance import assert_close

KINDS = list(tiny.CONFIGS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_logits(loaded: LoadedModel, docs: list[list[int]]) -> torch.Tensor:
    device = loaded.model.embed.weight.device
    tokens_T = torch.tensor(list(itertools.chain(*docs)), device=device)
    positions_T = torch.cat([torch.arange(len(doc), device=device) for doc in docs])
    starts = tuple(itertools.accumulate((len(doc) for doc in docs), initial=0))
    return loaded.model.head(loaded.model(tokens_T, positions_T, PackedAttend(loaded.config, starts)))


def paged_logits(loaded: LoadedModel, docs: list[list[int]], chunk: int, block_tokens: int = 8) -> torch.Tensor:
    """Logits of every position, computed in steps: chunks of `chunk` tokens of all documents together, the last ones token by token."""
    device = loaded.model.embed.weight.device
    cache = KVCache(loaded.config, 64, block_tokens, torch.float32, device)
    blocks = random.Random(0).sample(range(64), 64)
    sequences = [Sequence(Request(str(i), tuple(doc)), 0, i, list(doc), 256) for i, doc in enumerate(docs)]
    for sequence in sequences:
        sequence.blocks = [blocks.pop() for _ in range(-(-len(sequence.tokens) // block_tokens))]
    out: list[list[torch.Tensor]] = [[] for _ in docs]
    while any(s.num_computed < len(s.tokens) for s in sequences):
        work = []
        for s in sequences:
            left = len(s.tokens) - s.num_computed
            num_new = 1 if left <= 5 else min(chunk, left - 5)
            if left:
                work.append(Scheduled(s, s.num_computed, num_new, num_new == left))
        tokens_T = torch.tensor([t for w in work for t in w.sequence.tokens[w.start : w.start + w.num_new]], device=device)
        positions_T = torch.tensor([p for w in work for p in range(w.start, w.start + w.num_new)], device=device)
        hidden_TD = loaded.model(tokens_T, positions_T, PagedAttend(loaded.config, cache, work))
        for w, rows in zip(work, loaded.model.head(hidden_TD).split([w.num_new for w in work]), strict=True):
            out[int(w.sequence.request.id)].append(rows)
            w.sequence.num_computed += w.num_new
    return torch.cat(list(itertools.chain(*out)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_chunked_prefill_and_batched_decode_over_scattered_blocks_equal_packed(kind: str, chunk: int, device: str) -> None:
    loaded = tiny.build(kind, device=device)
    docs = tiny.documents(23, 5, 41, 1, 12, 30)
    assert_close(paged_logits(loaded, docs, chunk), packed_logits(loaded, docs), "fp32_reorder")


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_packed_document_is_bitwise_what_it_is_alone(kind: str) -> None:
    loaded = tiny.build(kind)
    prepack(loaded.model)
    docs = tiny.documents(9, 1, 33)
    alone = torch.cat([packed_logits(loaded, [doc]) for doc in docs])
    assert_close(packed_logits(loaded, docs), alone, "exact")


@torch.inference_mode()
def naive_greedy(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        token = int(packed_logits(loaded, [tokens])[-1].argmax())
        if token == tiny.EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    """Run requests to the end, with the invariants checked after every step."""
    for request in requests:
        engine.add(request)
    tokens: dict[tuple[str, int], list[int]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step():
            assert output.error is None, output.error
            tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
        engine.check()
    assert not engine.has_work and engine.stats().blocks_used == 0
    return tokens


def small_engine(kind: str, num_blocks: int | None = None, device: str = "cpu", **changes: object) -> Engine:
    config = EngineConfig.parse(
        {"dtype": "float32", "block_tokens": 8, "max_context": 128, "max_running": 8, "max_step_tokens": 16, **changes}
    )
    if num_blocks:
        per_block = KVCache.bytes_per_block(tiny.CONFIGS[kind], 8, torch.float32)
        config = config.model_copy(update={"kv_bytes": num_blocks * per_block})
    return Engine(tiny.build(kind, device=device), config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_blocks", "prefix_cache"), [(None, False), (None, True), (16, False), (16, True)])
@pytest.mark.parametrize("device", DEVICES)
def test_engine_greedy_equals_naive_greedy(kind: str, num_blocks: int | None, prefix_cache: bool, device: str) -> None:
    """With and without prefix hits, with enough blocks and with so few that sequences are preempted."""
    shared, *tails = tiny.documents(21, 4, 9, 1, 17)
    prompts = [shared + tail for tail in tails] + [shared + tails[0], tails[3]]
    engine = small_engine(kind, num_blocks, device, prefix_cache=prefix_cache)
    params = SamplingParams(temperature=0.0, max_tokens=30)
    requests = [Request(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)]
    tokens = run(engine, requests)
    again = run(engine, [Request(f"again {r.id}", r.prompt, params) for r in requests])
    loaded = tiny.build(kind)
    for i, prompt in enumerate(prompts):
        want = naive_greedy(loaded, prompt, 30)
        assert tokens[str(i), 0] == want
        assert again[f"again {i}", 0] == want
    stats = engine.stats()
    assert (stats.preemptions > 0) == (num_blocks is not None)
    assert (stats.prefix_hit_tokens > 0) == prefix_cache


@pytest.mark.parametrize("num_blocks", [None, 20])
def test_parallel_samples_share_blocks_and_equal_single_samples(num_blocks: int | None) -> None:
    """Each of n samples is what that sample is alone: copy on write keeps them apart, preemption does not change them."""
    prompt = tuple(tiny.documents(19)[0])
    params = SamplingParams(n=5, seed=7, max_tokens=40, ignore_eos=True, temperature=1.5)
    together = run(small_engine("gqa", num_blocks), [Request("a", prompt, params), Request("b", prompt[:9], params)])
    alone = run(small_engine("gqa"), [Request("a", prompt, params)])
    assert {key: together[key] for key in alone} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 5


def test_samples_hold_the_prompts_blocks_once() -> None:
    engine = small_engine("gqa")
    engine.add(Request("a", tuple(tiny.documents(32)[0]), SamplingParams(n=8, seed=1, max_tokens=4, ignore_eos=True)))
    while engine.stats().running < 8:
        engine.step()
    engine.step()
    assert engine.stats().blocks_used == 32 // 8 + 8
    engine.abort("a")
    engine.check()
    assert engine.stats().blocks_used == 0


def test_the_same_seed_gives_the_same_text_whatever_else_runs() -> None:
    prompt = tuple(tiny.documents(11)[0])
    params = SamplingParams(seed=3, max_tokens=25, ignore_eos=True)
    alone = run(small_engine("gqa"), [Request("a", prompt, params)])
    crowd = [Request(str(i), tuple(doc), SamplingParams(seed=i, max_tokens=20)) for i, doc in enumerate(tiny.documents(30, 8, 3, 16, 44))]
    assert run(small_engine("gqa"), [*crowd, Request("a", prompt, params)])["a", 0] == alone["a", 0]
    assert run(small_engine("gqa"), [Request("a", prompt, params.model_copy(update={"seed": 4}))]) != alone
