"""Perplexity and divergence against hand-made logits, and the engine's own path against a packed forward."""

import math

import pytest
import torch

from gemel.bench import quality
from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.engine.engine import Engine
from gemel.engine.logits import Logits
from gemel.model.attend import PackedAttend
from gemel.tokenizer.tokenizer import Tokenizer
from tests import tiny
from tests.tokenizer.shapes import byte_level_library
from tests.tolerance import assert_close

CONFIG = EngineConfig(device="cpu", dtype="float32", kernels="torch", max_running=2, max_context=24, kv_bytes=2**20)


class Steady:
    """The same distribution over three tokens for every sequence at every step."""

    def __init__(self, *probabilities):
        self.logits = torch.tensor(probabilities).log() + 5.0
        self.plans = []

    def run(self, plan):
        self.plans.append([(item.sequence.tokens[item.start], item.start) for item in plan.work])
        return Logits.of(self.logits.expand(len(plan.work), -1).clone())


def test_figures_of_known_distributions():
    reference, tested = Steady(0.5, 0.25, 0.25), Steady(0.25, 0.5, 0.25)
    score = quality.score(reference, tested, [[0, 1, 0], [2, 2, 0]], at_once=2, block_tokens=16)
    figures = score.figures()
    # Scored are 1, 0 and 2, 0: never a window's first token.
    loss = -math.log(0.5 * 0.25 * 0.25 * 0.25) / 4
    reference_loss = -math.log(0.25 * 0.5 * 0.25 * 0.5) / 4
    assert score.num_tokens == 4
    assert figures["perplexity"].median == pytest.approx(math.exp(loss))
    assert figures["perplexity"].planned == pytest.approx(math.exp(reference_loss))
    assert figures["perplexity_increase_percent"].median == pytest.approx(100 * (math.exp(loss - reference_loss) - 1))
    assert figures["kl_to_fp32_nats"].median == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert figures["top1_agreement"].median == 0.0


def test_windows_are_led_along_the_text_side_by_side():
    runner = Steady(0.5, 0.25, 0.25)
    quality.score(runner, Steady(0.5, 0.25, 0.25), [[0, 1, 2], [2, 1, 0], [1, 1, 1]], at_once=2, block_tokens=16)
    assert runner.plans == [[(0, 0), (2, 0)], [(1, 1), (1, 1)], [(1, 0)], [(1, 1)]]


def test_the_engines_path_scores_what_a_packed_forward_does():
    loaded, documents = tiny.build(), tiny.documents(20, 20, 20)
    tokens_T = torch.tensor([token for document in documents for token in document])
    positions_T = torch.arange(20).repeat(3)
    with torch.inference_mode():
        hidden_TD = loaded.model(tokens_T, positions_T, PackedAttend(loaded.config, (0, 20, 40, 60)))
        logits_TV = loaded.model.head(hidden_TD).view(3, 20, -1)[:, :-1].double()
    next_T = tokens_T.view(3, 20)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits_TV.flatten(0, 1), next_T.flatten())
    runner = Engine(tiny.build(), CONFIG).runner
    score = quality.score(runner, runner, documents, at_once=2, block_tokens=CONFIG.block_tokens)
    assert_close(torch.tensor(score.loss / score.num_tokens), loss, "fp32_reorder")
    assert score.kl == pytest.approx(0.0, abs=1e-9) and score.agreed == score.num_tokens == 3 * 19


class Follows:
    """Finds the token likeliest that comes after the last one, by a table; the others by how near they are."""

    def __init__(self, after, plans=None):
        self.after, self.plans = after, plans if plans is not None else []

    def run(self, plan):
        self.plans.append([(item.sequence.tokens[item.start : item.start + item.num_new], item.start) for item in plan.work])
        last = [item.sequence.tokens[item.start + item.num_new - 1] for item in plan.work]
        distance = [[abs(token - self.after[one]) for token in range(len(self.after))] for one in last]
        return Logits.of(-0.25 * torch.tensor(distance).float())


def test_greedy_texts_part_where_another_token_is_likeliest():
    reference, tested = Follows([1, 2, 3, 4, 0]), Follows([1, 2, 3, 2, 0])
    windows = [[3, 3, 4, 0, 9, 9, 9, 9], [0, 0, 0, 1, 9, 9, 9, 9], [0, 0, 0, 4, 9, 9, 9, 9]]
    found = quality.greedy(reference, tested, windows, at_once=2, block_tokens=16)
    # From 0: 1 2 3, and then 4 or 2, which is two away; from 1: 2 3, and then; from 4: 0 1 2 3, which is the end.
    assert (found.num_prompts, found.num_tokens) == (3, 4)
    assert found.differences == (quality.Difference(0, 3, 4, 2, 0.5), quality.Difference(1, 2, 4, 2, 0.5))
    assert reference.plans[:3] == tested.plans[:3] == [[([3, 3, 4, 0], 0), ([0, 0, 0, 1], 0)], [([1], 4), ([2], 4)], [([2], 5), ([3], 5)]]
    assert reference.plans[3] == [([3], 6)] and len(reference.plans) == 8  # who differs goes no further
    figures = found.figures()
    assert (figures["greedy_texts_equal"].median, figures["greedy_texts_equal"].planned) == (1, 3)
    assert figures["greedy_largest_gap"].median == 0.5
    assert "equal for 3 of 4 tokens" in found.lines()[0] and found.as_json()["num_prompts"] == 3


def test_greedy_texts_of_one_runner_are_equal_and_what_the_model_says():
    loaded, documents = tiny.build(), tiny.documents(20, 20, 20)
    runner = Engine(tiny.build(), CONFIG).runner
    lines = []

    class Noted:
        def run(self, plan):
            lines.append([item.sequence for item in plan.work])
            return runner.run(plan)

    assert not quality.greedy(runner, Noted(), documents, at_once=2, block_tokens=CONFIG.block_tokens).differences
    for number, sequence in ((0, lines[0][0]), (1, lines[0][1]), (2, lines[-1][0])):
        tokens = list(documents[number][:10])
        for _ in range(10):
            with torch.inference_mode():
                hidden_TD = loaded.model(torch.tensor(tokens), torch.arange(len(tokens)), PackedAttend(loaded.config, (0, len(tokens))))
                tokens.append(int(loaded.model.head(hidden_TD[-1:]).argmax()))
        assert sequence.tokens == tokens


def test_settings_of_both_engines():
    given = EngineConfig(weights="int4", weight_group=64, kv="int8", max_running=64)
    tested = quality.scoring(given, window=128, num_windows=5)
    assert (tested.max_context, tested.max_running, tested.weights, tested.kv) == (128, 5, "int4", "int8")
    exact = quality.reference(tested)
    assert (exact.dtype, exact.weights, exact.weight_group, exact.activations) == ("float32", "auto", None, "full")
    assert (exact.kv, exact.kernels, exact.max_running) == ("auto", "torch", 5)
    EngineConfig.parse(exact.model_dump())


def test_windows_of_a_text():
    tokenizer = Tokenizer(byte_level_library())
    text = "one two three four"
    tokens = tokenizer.encode(text, add_bos=False)
    cut = quality.windows(text, tokenizer, 4, num_tokens=len(tokens) - 1)
    assert cut and all(len(window) == 4 for window in cut)
    assert [token for window in cut for token in window] == tokens[: 4 * len(cut)]
    assert 4 * len(cut) < len(tokens)
    with pytest.raises(ConfigError, match="lower --window"):
        quality.windows("a", tokenizer, 400, 1000)


def test_a_text_is_read_or_refused(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("grüße", encoding="utf-8")
    assert quality.read(path) == ("grüße", "some.txt")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"some\.txt"):
        quality.read(path)
    with pytest.raises(ConfigError, match="absent"):
        quality.read(tmp_path / "absent.txt")


def test_the_built_in_text_is_english_of_the_standard_library():
    text, name = quality.read(None)
    assert len(text) > 300_000 and "Return" in text and "docstrings of Python" in name
    assert text == quality.read(None)[0]
