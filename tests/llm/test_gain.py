from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemel.llm.gain import Gain
from gemel.model import build
from gemel.model.attend import PackedAttend
from gemel.tokenizer.conversation import Conversation, Message
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tolerance import assert_close

TALKS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name three primary colors.": "Red, yellow and blue.",
    "Translate 'good morning' into Spanish.": "Buenos días.",
}


def talk(question: str, *answer: str, **rest: tuple[Message, ...]) -> Conversation:
    return Conversation((Message("user", question), *(Message("assistant", text) for text in answer)), question, "test", **rest)


@pytest.fixture(scope="module")
def gain(smollm2: Path) -> Gain:
    return Gain(smollm2)


def test_it_is_the_difference_of_two_log_probabilities(smollm2: Path, gain: Gain) -> None:
    """Against the same prompts, rendered as a server does, one at a time."""
    tokenizer, loaded = Tokenizer.load(smollm2), build.load(smollm2)

    def mean(question: str, answer: str) -> float:
        prompt = tokenizer.render_chat([{"role": "user", "content": question}])
        said = [*tokenizer.encode(answer, add_bos=False), tokenizer.eos_ids[0]]
        ids = torch.tensor([*prompt, *said])
        with torch.inference_mode():
            hidden = loaded.model(ids, torch.arange(len(ids)), PackedAttend(loaded.config, (0, len(ids))))
            logprobs = torch.log_softmax(loaded.model.head(hidden[len(prompt) - 1 : -1]).double(), -1)
        return logprobs.gather(1, torch.tensor(said)[:, None]).mean().item()

    want = [mean(question, answer) - mean("", answer) for question, answer in TALKS.items()]
    got = gain([talk(question, answer) for question, answer in TALKS.items()])
    assert_close(torch.tensor(got), torch.tensor(want), "fp32_reorder")


def test_answers_to_other_questions_gain_less(gain: Gain) -> None:
    questions, answers = list(TALKS), list(TALKS.values())
    right = gain([talk(q, a) for q, a in zip(questions, answers, strict=True)])
    wrong = gain([talk(q, a) for q, a in zip(questions, answers[1:] + answers[:1], strict=True)])
    assert all(r is not None and w is not None and r > max(w, 0) for r, w in zip(right, wrong, strict=True))


def test_what_cannot_be_measured_is_not_guessed(gain: Gain) -> None:
    pair = talk("What is the capital of France?", chosen=(Message("assistant", "Paris."),), rejected=(Message("assistant", "Rome."),))
    endless = talk("Count.", "one " * 9000)
    measured = gain([talk("Nothing is answered."), endless, pair, talk("What is the capital of France?", "Paris.")])
    assert measured[:2] == [None, None]
    assert measured[2] == pytest.approx(measured[3])
    assert gain([]) == []
