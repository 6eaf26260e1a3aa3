"""Native drawing, compiled for each instruction set: right by a plain oracle, and the same bits whatever else is drawn, by any threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gemel.config.sampling import SamplingParams
from gemel.engine.request import Request
from gemel.engine.request import Sequence as Tokens
from gemel.engine.sample import Row
from gemel.ops.cpu import native
from gemel.ops.cpu.sampler import Marked, Sampler
from tests.engine import oracle
from tests.ops.cpu.conftest import OpenKernels
from tests.tolerance import assert_close

SOURCES = ("sampler.cpp", "candidates.cpp", "threads.cpp")
NAMES = ("gemel_team_new", "gemel_team_free", "gemel_sampler_new", "gemel_sampler_free", "gemel_sampler_run")
VOCAB = 2 * 8192 + 300 + 5  # two chunks and a piece of one, which ends in a piece of a block, which ends in a piece of a vector
Logits = npt.NDArray[np.float32]
Result = tuple[list[tuple[int, float]], list[list[tuple[int, float]]]]


class Kernels:
    """One variant, with samplers over teams of one to three threads."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.teams = {threads: library.gemel_team_new(threads) for threads in (1, 2, 3)}

    def run(self, logits_SV: Logits, rows: Sequence[Row], threads: int = 2) -> Result:
        """Tokens with their log-probabilities, and the likeliest of each row."""
        sampler = Sampler(self.library, self.teams[threads], logits_SV.shape[1], self)
        most = [row.params.logprobs or 0 for row in rows]
        draws = [row.draws.next(i, int(logits_SV[i].argmax()), float(logits_SV[i].max())) for i, row in enumerate(rows)]
        drawn, likeliest = sampler.run(logits_SV, draws, max(most))
        return drawn.tolist(), [line[:number].tolist() for line, number in zip(likeliest, most, strict=True)]

    def close(self) -> None:
        for team in self.teams.values():
            self.library.gemel_team_free(team)


@pytest.fixture(scope="module", params=native.VARIANTS)
def kernels(request: pytest.FixtureRequest, open_kernels: OpenKernels) -> Iterator[Kernels]:
    kernels = Kernels(open_kernels(request.param, SOURCES, NAMES))
    yield kernels
    kernels.close()


def make_row(seed: int, **params: object) -> Row:
    random = np.random.default_rng(seed)
    prompt, output = (tuple(random.integers(0, 50, size).tolist()) for size in (20, 9))
    request = Request(str(seed), prompt, SamplingParams.parse(params))
    return Row(Tokens(request, seed % 3, 0, [*prompt, *output], 100), seed, (2, 4))


def shapes(vocab_size: int) -> dict[str, Logits]:
    """Rows as models make them, and as they do not."""
    random = np.random.default_rng(vocab_size)
    peaked = random.normal(0, 3, vocab_size)
    alone = np.linspace(0.0, 1e-3, vocab_size)
    alone[vocab_size // 2] = 12.0  # the others fall into one bin
    rows = {
        "peaked": peaked,
        "ties": peaked.round(1),
        "flat": random.permutation(np.linspace(0.0, 1e-3, vocab_size)),
        "equal": np.full(vocab_size, -3.0),
        "alone": random.permutation(alone),
        "steep": np.linspace(-1e30, 1e30, vocab_size),
    }
    return {name: values.astype(np.float32) for name, values in rows.items()}


RULES: list[dict[str, object]] = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 30.0, "logit_bias": {0: 3.0, 39: -100.0}},
    {"top_k": 1},
    {"top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"top_k": 5000, "top_p": 0.7},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"top_p": 0.9, "logprobs": 3},
    {"top_p": 0.999999, "temperature": 3.0},
    {"min_p": 0.05, "top_k": 100},
    {"min_p": 1.0, "min_tokens": 30, "logprobs": 0},
    {"top_p": 0.8, "min_p": 0.01, "presence_penalty": 1.0, "logprobs": 20, "temperature": 0.5},
]


@pytest.mark.parametrize("vocab_size", [37, VOCAB])
@pytest.mark.parametrize("shape", shapes(37))
def test_tokens_are_those_that_their_numbers_mean(kernels: Kernels, shape: str, vocab_size: int) -> None:
    rows = [make_row(7 * i + vocab_size, **rules) for i, rules in enumerate(RULES)]
    logits_V = shapes(vocab_size)[shape]
    if vocab_size < 50:
        rows = [row for row in rows if not row.params.logit_bias]
        for row in rows:
            row.sequence.tokens = [token % vocab_size for token in row.sequence.tokens]
    drawn, _ = kernels.run(np.stack([logits_V] * len(rows)), rows)
    for row, (token, _) in zip(rows, drawn, strict=True):
        assert oracle.accepts(logits_V, row, token), f"token {token} for {row.params}"


def test_rows_are_the_same_bits_alone_and_together_and_on_any_number_of_threads(kernels: Kernels) -> None:
    names = shapes(VOCAB)
    logits_SV = np.stack([names[name] for name in list(names) * 3][: len(RULES)])
    together = kernels.run(logits_SV, [make_row(i, **rules) for i, rules in enumerate(RULES)], threads=1)
    again = kernels.run(logits_SV, [make_row(i, **rules) for i, rules in enumerate(RULES)], threads=3)
    few = [kernels.run(logits_SV[i : i + 1], [make_row(i, **rules)], 3 - i % 2) for i, rules in enumerate(RULES)]
    assert [token for token, _ in together[0]] == [token for token, _ in again[0]] == [drawn[0][0] for drawn, _ in few]
    for i, rules in enumerate(RULES):
        if "logprobs" in rules:
            assert together[0][i] == again[0][i] == few[i][0][0]
            assert together[1][i] == again[1][i] == few[i][1][0] and len(together[1][i]) == rules["logprobs"]


def test_log_probabilities_are_those_of_the_row_as_it_is(kernels: Kernels) -> None:
    logits_V = shapes(VOCAB)["ties"]
    [(token, logprob)], [likeliest] = kernels.run(logits_V[None], [make_row(0, logprobs=20, logit_bias={9: 100.0}, temperature=0.1)])
    wanted_V = logits_V - np.log(np.exp(logits_V.astype(np.float64)).sum())
    order = np.lexsort((np.arange(VOCAB), -logits_V))[:20]
    assert token == 9 and [token for token, _ in likeliest] == order.tolist()
    got = torch.tensor([logprob, *(number for _, number in likeliest)])
    assert_close(got, torch.from_numpy(wanted_V[[9, *order]]), "fp32_reorder")


def test_a_row_of_which_everything_is_banned_draws_nothing(kernels: Kernels) -> None:
    row = Row(Tokens(Request("r", (0,), SamplingParams(min_tokens=1)), 0, 0, [0], 9), 0, tuple(range(37)))
    assert kernels.run(shapes(37)["peaked"][None], [row])[0][0][0] == -1


def test_the_structure_is_as_large_as_the_compiler_says(kernels: Kernels) -> None:
    """Two draws in a row: if a field were missing, the second one would read the first one's numbers."""
    logits_SV = np.zeros((2, 37), np.float32)
    logits_SV[1, 30] = 100.0
    assert kernels.run(logits_SV, [make_row(0), make_row(1)])[0][1][0] == 30


def test_marks_count_what_is_added() -> None:
    marked = Marked({5: 1.5, 8: -1.0}, start=1)
    draw = native.Draw()
    marked.follow([9, 8, 7], num_prompt=2)
    marked.follow([9, 8, 7, 7, 5, 9], num_prompt=2)
    marked.put(draw)
    ints, floats = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
    size = draw.num_marked
    assert ctypes.cast(draw.marked, ints)[:size] == [5, 8, 7, 9]
    assert ctypes.cast(draw.counts, ints)[:size] == [1, 0, 2, 1]
    assert ctypes.cast(draw.bias, floats)[:size] == [1.5, -1.0, 0.0, 0.0]
