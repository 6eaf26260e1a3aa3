"""Kneser-Ney estimates against a plain implementation over dictionaries, and probabilities that sum to one."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.steps.ngram import BEGIN, END, UNKNOWN, NgramModel, Table, tokenize, train
from gemel.data.steps.segment import RunningHash, hash_of
from tests.tolerance import assert_close

Gram = tuple[str, ...]
FALLBACK = (0.0, 0.5, 1.0, 1.5)
WORDS = [f"w{i}" for i in range(200)]


def corpus(seed: int = 0, num_lines: int = 120) -> str:
    """Lines of words, the next of which depends on the one before."""
    draw = random.Random(seed)
    lines = []
    for _ in range(num_lines):
        words = [WORDS[min(199, int(draw.paretovariate(0.7)))]]
        while draw.random() < 0.85:
            words.append(WORDS[min(199, int(draw.expovariate(0.05)) + WORDS.index(words[-1]) // 2)])
        lines.append(" ".join(words))
    return "\n".join(lines)


class Plain:
    """Interpolated modified Kneser-Ney, one n-gram at a time, straight from Chen and Goodman (1999), section 3."""

    def __init__(self, text: str, order: int):
        self.order = order
        sentences = [("<s>", *line.split(), "</s>") for line in text.split("\n")]
        raw = [Counter(s[i : i + n] for s in sentences for i in range(len(s) - n + 1)) for n in range(1, order + 1)]
        self.counts: list[dict[Gram, int]] = []
        for n in range(1, order + 1):
            if n == order:
                self.counts.append(dict(raw[n - 1]))
            else:
                before = defaultdict(set)
                for gram in raw[n]:
                    before[gram[1:]].add(gram[0])
                self.counts.append({g: raw[n - 1][g] if g[0] == "<s>" else len(before[g]) for g in raw[n - 1]})
        del self.counts[0][("<s>",)]
        self.discounts = [self._discounts(Counter(counts.values())) for counts in self.counts]

    @staticmethod
    def _discounts(n: Counter[int]) -> tuple[float, ...]:
        if not all(n[i] for i in (1, 2, 3, 4)):
            return FALLBACK
        y = n[1] / (n[1] + 2 * n[2])
        discounts = 0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]
        return discounts if all(0 <= discount <= count for count, discount in enumerate(discounts)) else FALLBACK

    def p(self, context: Gram, word: str) -> float:
        context = context[len(context) - min(len(context), self.order - 1) :]
        if context and not any(gram[:-1] == context for gram in self.counts[len(context)]):
            return self.p(context[1:], word)
        counts, discounts = self.counts[len(context)], self.discounts[len(context)]
        follow = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        total = sum(follow.values())
        left = sum(discounts[min(count, 3)] for count in follow.values()) / total
        lower = self.p(context[1:], word) if context else 1 / (len(follow) + 1)
        count = follow.get(word, 0)
        return (count - discounts[min(count, 3)]) / total + left * lower

    def log_p(self, line: str) -> float:
        words = ("<s>", *line.split(), "</s>")
        return float(sum(np.log10(self.p(words[:i], words[i])) for i in range(1, len(words))))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_estimates_are_those_of_the_plain_implementation(order):
    text = corpus()
    plain, model = Plain(text, order), train([[text]], order)
    assert (plain.discounts[-1] == FALLBACK) == (order != 2)  # both ways to get them are tried
    lines = [*corpus(1, 20).split("\n"), "w3 never seen w3", "w0"]
    got, num_tokens = model.score(lines)
    assert num_tokens.tolist() == [len(line.split()) + 1 for line in lines]
    assert_close(torch.tensor(got), torch.tensor([plain.log_p(line) for line in lines], dtype=torch.float64), "fp32_reorder")


def conditional(model: NgramModel, context: list[int], word: int) -> float:
    """By backing off in the tables, written another way than the model does it."""
    if len(context) >= len(model.tables):
        context = context[1:]
    table = model.tables[len(context)]
    row = find(table, [*context, word])
    if row >= 0:
        return float(10.0 ** table.log_p[row])
    if not context:
        return float(10.0 ** table.log_p[find(table, [UNKNOWN])])
    below = model.tables[len(context) - 1]
    held = find(below, context)
    return conditional(model, context[1:], word) * (10.0 ** float(below.backoff[held]) if held >= 0 else 1.0)


def find(table: Table, words: list[int]) -> int:
    return int(table.find(RunningHash(np.array(words, np.uint64)).windows(len(words)))[0])


@pytest.mark.parametrize("min_count", [1, 3])
def test_probabilities_of_all_words_sum_to_one_behind_every_context(min_count):
    model = train([[corpus()]], 3, min_count=min_count)
    words = [hash_of(word) for word in sorted(set(corpus().split()))] + [END, UNKNOWN]
    contexts = [[], [BEGIN], [words[0]], [BEGIN, words[1]], [words[2], words[1]], [words[0], words[7]], [hash_of("never")]]
    sums = [sum(conditional(model, context, word) for word in words) for context in contexts]
    assert_close(torch.tensor(sums), torch.ones(len(sums)), "fp32_reorder")
    if min_count > 1:
        assert len(model.tables[2].keys) < len(train([[corpus()]], 3).tables[2].keys)


def test_batches_and_neighbours_do_not_matter():
    text, other = corpus(1, 10), corpus(2, 10)
    model = train([[corpus()], [other]], 3)
    same = train([[corpus(), other]], 3)
    together, _ = model.score([text, "", other, text])
    assert together[0] == together[3] == same.score([text])[0][0]
    assert together[1] == 0.0
    lines, _ = model.score(text.split("\n"))
    assert_close(torch.tensor([lines.sum()]), torch.tensor([together[0]]), "fp32_reorder")


def test_units_and_folding():
    def count(text: str, unit: str, fold: bool = False) -> int:
        return len(tokenize([text], unit, fold)[0]) - 2  # type: ignore[arg-type]

    text = "Don't  stop, 东京"
    assert [count(text, unit) for unit in ("words", "spaces", "characters")] == [5, 3, 12]
    assert (tokenize(["ABC"], "words", True)[0] == tokenize(["abc"], "words", False)[0]).all()
    chinese = train([["今天天气很好。\n今天很好。"]], 2)
    known, unknown = chinese.score(["今天很好。", "弓早力弓。"])[0]
    assert known > unknown


def test_saved_and_loaded(tmp_path):
    model = train([[corpus()]], 3, "characters", fold=False)
    model.save(tmp_path / "m.safetensors")
    loaded = NgramModel.load(tmp_path / "m.safetensors")
    assert (loaded.unit, loaded.fold) == ("characters", False)
    texts = corpus(3, 20).split("\n")
    assert (loaded.score(texts)[0] == model.score(texts)[0]).all()


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("no model")
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors", "missing"):
        with pytest.raises(CheckpointError, match=name):
            NgramModel.load(tmp_path / name)


def test_nothing_to_learn_from():
    for texts in ([], [[]], [["", "\n"]]):
        with pytest.raises(ConfigError, match="no text"):
            train(texts)


def test_tables_find_all_keys_and_no_others():
    keys = np.unique(np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64, endpoint=False))
    table = Table(keys[::2], np.zeros(2500, np.float32), np.zeros(2500, np.float32))
    assert (table.find(keys) == np.where(np.arange(len(keys)) % 2 == 0, np.arange(len(keys)) // 2, -1)).all()
    assert Table(keys[:0], table.log_p[:0], table.backoff[:0]).find(keys[:3]).tolist() == [-1, -1, -1]
