"""Both samplers, by tensors and native, against distributions worked out by hand in float64, and against each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from gemel.config.sampling import SamplingParams
from gemel.engine.logits import Logits
from gemel.engine.request import Request, Sequence
from gemel.engine.sample import CANDIDATES, Drawn, Row, sample, uniform
from gemel.ops.cpu import native
from gemel.ops.cpu.sampler import Sampler
from tests.engine import oracle
from tests.tolerance import CHI_SQUARE_P, assert_close

VOCAB = 40
Draw = Callable[..., list[Drawn]]


def row(
    seed: int = 0, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), end_tokens: tuple[int, ...] = (), **params: object
) -> Row:
    request = Request("r", prompt, SamplingParams.parse(params))
    return Row(Sequence(request, 0, 0, [*prompt, *output], 100), seed, end_tokens)


def by_tensors(logits_SV: torch.Tensor, rows: list[Row], at: list[int] | None = None) -> list[Drawn]:
    return sample(Logits.of(logits_SV), rows, at or range(len(rows)))


@pytest.fixture(scope="module")
def natively() -> Iterator[Draw]:
    library, why_not = native.find()
    if library is None:
        pytest.skip(why_not)
    team = library.gemel_team_new(2)

    def draw(logits_SV: torch.Tensor, rows: list[Row], at: list[int] | None = None) -> list[Drawn]:
        of = Logits.of(logits_SV)
        sampler = Sampler(library, team, logits_SV.shape[1], None)
        return sample(Logits(logits_SV.contiguous(), of.argmax_S, of.largest_S, sampler), rows, at or range(len(rows)))

    yield draw
    library.gemel_team_free(team)


@pytest.fixture(params=["tensors", "native"])
def draw(request: pytest.FixtureRequest) -> Draw:
    return by_tensors if request.param == "tensors" else request.getfixturevalue("natively")


def draw_many(draw: Draw, logits_V: torch.Tensor, count: int, **params: object) -> np.ndarray:
    rows = [row(seed, **params) for seed in range(count)]
    return np.array([drawn.token for drawn in draw(logits_V.repeat(count, 1), rows)])


def assert_distribution(tokens: np.ndarray, probability_V: torch.Tensor) -> None:
    """Chi-square test of drawn tokens against probabilities; tokens of probability zero must not occur."""
    expected = probability_V.double().numpy() * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    statistic = (((observed - expected) ** 2)[likely] / expected[likely]).sum()
    freedom = max(1, int(likely.sum()) - 1)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))  # Wilson and Hilferty 1931
    assert 0.5 * math.erfc(z / math.sqrt(2)) > CHI_SQUARE_P, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


@pytest.fixture
def logits_V() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def test_temperature(draw: Draw, logits_V: torch.Tensor) -> None:
    assert_distribution(draw_many(draw, logits_V, 20_000, temperature=0.7), torch.softmax(logits_V.double() / 0.7, -1))


def test_a_whole_distribution_over_many_chunks_is_inverted(draw: Draw) -> None:
    logits_V = torch.randn(3 * 256 + 17, generator=torch.Generator().manual_seed(5))
    assert_distribution(draw_many(draw, logits_V, 60_000), torch.softmax(logits_V.double(), -1))


def test_top_k(draw: Draw, logits_V: torch.Tensor) -> None:
    kept = torch.full_like(logits_V, -torch.inf).scatter(0, logits_V.topk(5).indices, logits_V.topk(5).values)
    assert_distribution(draw_many(draw, logits_V, 20_000, top_k=5), torch.softmax(kept.double(), -1))


def nucleus(probability_V: torch.Tensor, top_p: float) -> torch.Tensor:
    out, total = torch.zeros_like(probability_V), 0.0
    for token in probability_V.argsort(descending=True).tolist():
        if total >= top_p:
            break
        out[token] = probability_V[token]
        total += probability_V[token].item()
    return out / out.sum()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p(draw: Draw, logits_V: torch.Tensor, top_p: float) -> None:
    assert_distribution(draw_many(draw, logits_V, 20_000, top_p=top_p), nucleus(torch.softmax(logits_V.double(), -1), top_p))


def test_top_p_acts_on_what_top_k_left(draw: Draw, logits_V: torch.Tensor) -> None:
    kept = torch.full_like(logits_V, -torch.inf).scatter(0, logits_V.topk(6).indices, logits_V.topk(6).values)
    assert_distribution(draw_many(draw, logits_V, 20_000, top_k=6, top_p=0.7), nucleus(torch.softmax(kept.double(), -1), 0.7))


def test_min_p(draw: Draw, logits_V: torch.Tensor) -> None:
    probability_V = torch.softmax(logits_V.double(), -1)
    kept = probability_V * (probability_V >= 0.2 * probability_V.max())
    assert_distribution(draw_many(draw, logits_V, 20_000, min_p=0.2), kept / kept.sum())


def test_a_flat_distribution_needs_more_candidates_than_are_tried_first(draw: Draw) -> None:
    logits_V = torch.linspace(0, 1e-3, 4 * CANDIDATES)
    tokens = draw_many(draw, logits_V, 20_000, top_p=0.9)
    assert_distribution(tokens, nucleus(torch.softmax(logits_V.double(), -1), 0.9))
    assert len(set(tokens.tolist())) > CANDIDATES


def test_greedy_takes_the_likeliest_and_a_tiny_temperature_agrees(draw: Draw, logits_V: torch.Tensor) -> None:
    want = logits_V.argmax().item()
    assert set(draw_many(draw, logits_V, 3, temperature=0.0)) == {want}
    assert set(draw_many(draw, logits_V, 50, temperature=1e-4)) == {want}


def test_a_mixed_batch_gives_each_row_what_it_would_get_alone(draw: Draw) -> None:
    logits_SV = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 3},
        {"top_p": 0.4, "temperature": 1.3},
        {"min_p": 0.3},
        {"repetition_penalty": 1.7, "logprobs": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {4: 5.0}, "logprobs": 0},
    ]
    rows = [row(seed, (1, 2, 3), (4, 4, 9), **params) for seed, params in enumerate(kinds)]
    together = draw(logits_SV, rows)
    assert together == [draw(logits_SV[i : i + 1], [rows[i]])[0] for i in range(len(rows))]


def test_several_rows_may_draw_from_the_same_logits_and_leave_them_as_they_are(draw: Draw) -> None:
    logits_SV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    before_SV = logits_SV.clone()
    rows = [row(seed, **params) for seed, params in enumerate(({"logit_bias": {7: 50.0}}, {"top_k": 4}, {"temperature": 0.0}, {}))]
    drawn = draw(logits_SV, rows, [2, 0, 2, 2])
    assert torch.equal(logits_SV, before_SV)
    assert drawn[0].token == 7
    assert drawn == [draw(logits_SV[i : i + 1], [one])[0] for i, one in zip([2, 0, 2, 2], rows, strict=True)]


def test_a_greedy_row_reads_nothing_but_the_argmax() -> None:
    nothing_SV = torch.empty(2, 0)  # any look at the values would fail
    drawn = sample(Logits(nothing_SV, [11, 12], [1.5, math.nan]), [row(temperature=0.0), row(temperature=0.0)], [0, 1])
    assert [one.token for one in drawn] == [11, None]


def test_penalties_and_bias_by_hand(draw: Draw) -> None:
    logits_V = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0, 0.0])
    prompt, output = (0, 1), (2, 2, 3)
    params = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5, "logit_bias": {4: 1.0}}
    # repetition: 2/2, -2*2, 1/2, 0.5/2; presence and frequency on the output only: 2 occurs twice, 3 once; bias comes first
    want = torch.tensor([1.0, -4.0, 0.5 - 0.25 - 1.0, 0.25 - 0.25 - 0.5, 1.0, 0.0]).double()
    rows = [row(seed, prompt, output, **params) for seed in range(20_000)]
    tokens = np.array([drawn.token for drawn in draw(logits_V.repeat(len(rows), 1), rows)])
    assert_distribution(tokens, torch.softmax(want, -1))


def test_end_tokens_are_impossible_before_min_tokens(draw: Draw) -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[7] = 50.0
    assert draw(logits_V[None], [row(min_tokens=2, output=(5,), end_tokens=(7,), temperature=0.0)])[0].token != 7
    assert draw(logits_V[None], [row(min_tokens=1, output=(5,), end_tokens=(7,), temperature=0.0)])[0].token == 7


def test_logprobs_are_the_models_own_before_temperature_and_bias(draw: Draw, logits_V: torch.Tensor) -> None:
    want_V = torch.log_softmax(logits_V.double(), -1)
    [drawn] = draw(logits_V[None], [row(logprobs=3, temperature=0.2, logit_bias={5: 100.0})])
    assert drawn.token == 5 and drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(want_V[5].item(), abs=1e-5)
    assert [token for token, _ in drawn.logprob.top] == want_V.topk(3).indices.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(draw: Draw, logits_V: torch.Tensor, bad: float) -> None:
    logits_SV = logits_V.repeat(3, 1)
    logits_SV[1, 4] = bad
    drawn = draw(logits_SV, [row(logprobs=1), row(logprobs=1), row(logprobs=1)])
    assert drawn[1].token is None and drawn[1].logprob is None
    assert drawn[0] == drawn[2] and drawn[0].token is not None


def test_uniform_is_uniform_and_depends_on_every_input() -> None:
    numbers = uniform(range(5000), [0] * 5000, [0] * 5000)
    assert abs(numbers.mean() - 0.5) < 0.02 and numbers.min() >= 0 and numbers.max() < 1
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert histogram.min() > 180
    assert len({uniform([s], [i], [c])[0] for s in range(3) for i in range(3) for c in range(3)}) == 27
    assert uniform([-1], [0], [0]) == uniform([2**64 - 1], [0], [0])


# --- one against the other ------------------------------------------------------------------------------------------------------------

RULES: list[dict[str, object]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.02, "temperature": 1.5},
    {"top_k": 300, "top_p": 0.8, "min_p": 0.001},
    {"top_p": 0.95, "temperature": 2.0},
]
CHANGES: list[dict[str, object]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": -0.4},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.1, "logit_bias": {3: -2.5, 250: 4.0}, "min_tokens": 20},
]


def test_both_draw_the_same_tokens_from_the_same_numbers(natively: Draw) -> None:
    """Wherever they do not, each is within rounding of where its token begins or ends."""
    random = np.random.default_rng(0)
    combinations = list(itertools.product(RULES, CHANGES))
    rows = []
    for seed in range(16 * len(combinations)):
        rules, changes = combinations[seed % len(combinations)]
        prompt, output = (tuple(random.integers(0, 700, size).tolist()) for size in (9, 12))
        rows.append(row(seed, prompt, output, (5, 6), **rules, **changes))
    logits_SV = torch.from_numpy(random.normal(0, 3, (len(rows), 700)).astype(np.float32))
    tensors, natives = by_tensors(logits_SV, rows), natively(logits_SV, rows)
    for one, other, drawn_row, logits_V in zip(tensors, natives, rows, logits_SV, strict=True):
        if one.token != other.token:
            assert oracle.accepts(logits_V.numpy(), drawn_row, one.token) and oracle.accepts(logits_V.numpy(), drawn_row, other.token)
    assert sum(one.token != other.token for one, other in zip(tensors, natives, strict=True)) < 3


def test_both_report_the_same_log_probabilities(natively: Draw) -> None:
    logits_SV = torch.randn(8, 9000, generator=torch.Generator().manual_seed(4)) * 4
    rows = [row(seed, logprobs=seed, temperature=seed % 2, logit_bias={7: 3.0} if seed > 4 else {}) for seed in range(8)]
    for one, other in zip(by_tensors(logits_SV, rows), natively(logits_SV, rows), strict=True):
        assert one.logprob is not None and other.logprob is not None and one.token == other.token == other.logprob.token
        assert [token for token, _ in one.logprob.top] == [token for token, _ in other.logprob.top]
        numbers = [torch.tensor([drawn.logprob, *(number for _, number in drawn.top)]) for drawn in (one.logprob, other.logprob)]
        assert_close(numbers[1], numbers[0], "fp32_reorder")


def test_occurrences_are_followed_while_a_sequence_grows(natively: Draw) -> None:
    """What is kept from step to step is what counting anew would find."""
    random, params = np.random.default_rng(1), {"repetition_penalty": 1.5, "frequency_penalty": 0.9, "temperature": 0.0}
    grown = row(0, (1, 2, 2), **params)
    for _ in range(40):
        logits_SV = torch.from_numpy(random.normal(0, 1, (1, VOCAB)).astype(np.float32))
        [drawn] = natively(logits_SV, [grown])
        assert drawn == by_tensors(logits_SV, [row(0, (1, 2, 2), tuple(grown.sequence.output), **params)])[0]
        assert drawn.token is not None
        grown.sequence.tokens.append(drawn.token)


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.5}, {"top_k": 3}])
def test_no_temperature_is_too_low(draw: Draw, logits_V: torch.Tensor, rules: dict[str, object]) -> None:
    assert set(draw_many(draw, logits_V, 20, temperature=1e-300, **rules)) == {logits_V.argmax().item()}
