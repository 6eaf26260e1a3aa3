"""What a cheaper way of computing costs in quality: perplexity on a text, and how far the distributions are from fp32's.

A text is cut into windows of equal length. Two runners, the one under test and one that computes in fp32 through torch, are led along all
windows side by side, a token of each per step, as in decoding; but the next token is the text's, whatever the model would say. So what is
scored is the engine's own path, with its pages and kernels, and no logit has to be kept longer than a step.

What a user sees of that is greedy text: it is the same until, somewhere, both find another token likeliest. So both runners continue the
first halves of windows side by side with what fp32 chooses, each until they differ, and by how much fp32 prefers its own token there says
whether that was a tie or a mistake.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gemel.bench.report import Figure
from gemel.config.engine import EngineConfig
from gemel.config.errors import ConfigError
from gemel.engine.logits import Logits
from gemel.engine.request import Request, Scheduled, StepPlan
from gemel.engine.request import Sequence as Tokens
from gemel.tokenizer.tokenizer import Tokenizer


class Runs(Protocol):
    """The part of a runner that is needed."""

    def run(self, plan: StepPlan) -> Logits:
        """Logits for every sequence of the plan that samples."""
        ...


@dataclass(slots=True)
class Score:
    """Sums over scored tokens, in nats. `reference_loss` and `loss` are negative log-probabilities of the text's tokens."""

    num_tokens: int = 0
    reference_loss: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, reference_SV: Tensor, tested_SV: Tensor, next_S: Tensor) -> None:
        """Count one step: logits of both, and the tokens that the text goes on with."""
        reference, tested = (torch.log_softmax(logits.double(), -1) for logits in (reference_SV, tested_SV))
        self.num_tokens += len(next_S)
        self.reference_loss -= reference.gather(1, next_S[:, None]).sum().item()
        self.loss -= tested.gather(1, next_S[:, None]).sum().item()
        self.kl += torch.nn.functional.kl_div(tested, reference, reduction="sum", log_target=True).item()
        self.agreed += int((reference.argmax(-1) == tested.argmax(-1)).sum().item())

    def figures(self) -> dict[str, Figure]:
        """Measured beside what fp32 gives: the plan of something exact."""
        reference, tested = exp(self.reference_loss / self.num_tokens), exp(self.loss / self.num_tokens)
        values = {
            "perplexity": (tested, reference),
            "perplexity_increase_percent": (100 * (tested / reference - 1), 0.0),
            "kl_to_fp32_nats": (self.kl / self.num_tokens, 0.0),
            "top1_agreement": (self.agreed / self.num_tokens, 1.0),
        }
        return {name: Figure(value, value, value, exact) for name, (value, exact) in values.items()}


@torch.inference_mode()
def score(reference: Runs, tested: Runs, windows: Sequence[Sequence[int]], at_once: int, block_tokens: int) -> Score:
    """Lead both runners along windows of equal length, `at_once` of them side by side."""
    score = Score()
    for first in range(0, len(windows), at_once):
        group = windows[first : first + at_once]
        lines = [_line(number, window, block_tokens) for number, window in enumerate(group)]
        for position in range(len(group[0]) - 1):
            plan = StepPlan(tuple(Scheduled(line, position, 1, True) for line in lines), (), ())
            next_S = torch.tensor([window[position + 1] for window in group])
            score.add(reference.run(plan).values_SV.cpu(), tested.run(plan).values_SV.cpu(), next_S)
    return score


@dataclass(frozen=True, slots=True)
class Difference:
    """Where greedy texts part: after `num_equal` tokens of a prompt's continuation. The reference's logits prefer its token by `gap`."""

    prompt: int
    num_equal: int
    reference: int
    tested: int
    gap: float


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy continuations of `num_prompts` prompts by `num_tokens` tokens each."""

    num_prompts: int
    num_tokens: int
    differences: tuple[Difference, ...]

    def figures(self) -> dict[str, Figure]:
        """Measured beside what fp32 gives."""
        equal, gap = self.num_prompts - len(self.differences), max((one.gap for one in self.differences), default=0.0)
        values = {"greedy_texts_equal": (equal, self.num_prompts), "greedy_largest_gap": (gap, 0.0)}
        return {name: Figure(value, value, value, exact) for name, (value, exact) in values.items()}

    def lines(self) -> list[str]:
        """For people: the texts that are not equal."""
        return [
            f"prompt {one.prompt}: equal for {one.num_equal} of {self.num_tokens} tokens, then {one.reference} in fp32 and {one.tested}; "
            f"logits {one.gap:.4f} apart in fp32"
            for one in self.differences
        ]

    def as_json(self) -> dict[str, object]:
        """All of it."""
        return asdict(self)


@torch.inference_mode()
def greedy(reference: Runs, tested: Runs, windows: Sequence[Sequence[int]], at_once: int, block_tokens: int) -> Greedy:
    """Continue the first halves of windows of equal length to their full length, `at_once` of them side by side."""
    num_prompt = len(windows[0]) // 2
    num_tokens = len(windows[0]) - num_prompt
    differences: list[Difference] = []
    for first in range(0, len(windows), at_once):
        group = windows[first : first + at_once]
        lines = {first + number: _line(number, window, block_tokens) for number, window in enumerate(group)}
        for position in range(num_tokens):
            start, num_new = (num_prompt + position - 1, 1) if position else (0, num_prompt)
            plan = StepPlan(tuple(Scheduled(line, start, num_new, True) for line in lines.values()), (), ())
            logits, tokens = reference.run(plan), tested.run(plan).argmax_S
            for i, (number, line) in enumerate(list(lines.items())):
                best, token = logits.argmax_S[i], tokens[i]
                line.tokens[num_prompt + position] = best
                if token != best:
                    gap = logits.largest_S[i] - logits.values_SV[i, token].item()
                    differences.append(Difference(number, position, best, token, gap))
                    del lines[number]
            if not lines:
                break
    return Greedy(len(windows), num_tokens, tuple(sorted(differences, key=lambda one: one.prompt)))


def scoring(config: EngineConfig, window: int, num_windows: int) -> EngineConfig:
    """`config` with exactly the room that windows side by side need, at most `max_running` of them."""
    at_once = min(config.max_running, num_windows)
    return config.model_copy(update={"max_context": window, "max_running": at_once})


def reference(config: EngineConfig) -> EngineConfig:
    """The same room, but weights as stored, and everything computed in fp32 by torch."""
    exact = {"dtype": "float32", "weights": "auto", "weight_group": None, "activations": "full", "kv": "auto", "kernels": "torch"}
    return config.model_copy(update=exact)


def _line(number: int, window: Sequence[int], block_tokens: int) -> Tokens:
    """A sequence that has all its tokens already, on blocks of its own."""
    num_blocks = -(-len(window) // block_tokens)
    line = Tokens(Request(str(number), tuple(window)), 0, number, list(window), len(window))
    line.blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
    return line


def windows(text: str, tokenizer: Tokenizer, length: int, num_tokens: int) -> list[list[int]]:
    """The first windows of `length` tokens of the text, `num_tokens` together at most. Raises ConfigError for a text that is too short."""
    tokens = tokenizer.encode(text, add_bos=False)[:num_tokens]
    cut = [tokens[first : first + length] for first in range(0, len(tokens) - length + 1, length)]
    if not cut:
        raise ConfigError(
            f"the text has {len(tokens)} tokens (--tokens allows {num_tokens}), less than one window of {length}: lower --window"
        )
    return cut


def read(path: Path | None) -> tuple[str, str]:
    """A text and its name: a UTF-8 file, or the docstrings of this Python's standard library, which is English that everybody has."""
    if path is None:
        return "\n\n".join(_docstrings()), f"docstrings of Python {sysconfig.get_python_version()}"
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text {path}: {error}; give a UTF-8 file, or leave --text out for docstrings of the standard library") from None


def _docstrings() -> Iterator[str]:
    """Docstrings of the library's own modules, in the order of their names."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield text
