"""From files to documents of ids: text through a data recipe and a learnt tokenizer, conversations with exactly the answers trained."""

from __future__ import annotations

import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemel.config.errors import ConfigError
from gemel.data.run.board import Interrupted
from gemel.data.run.local import TaskFailed, Workers
from gemel.tokenizer.conversation import Conversation, Message
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train.batch import Batch
from gemel.train.loader import Loader, passage
from gemel.train.prepare import Preparation
from gemel.train.progress import Progress
from gemel.train.run import run
from tests.tokenizer import shapes
from tests.train import runs

TALKS = [
    [("user", "the thing is here"), ("assistant", "where is the thing?")],
    [("system", "be there"), ("user", "in the end"), ("assistant", "then"), ("user", "the other"), ("assistant", "this one, then")],
    [("user", "then"), ("assistant", "in here " * 40)],
    [("user", "nobody answers")],
    [("assistant", "without a prompt")],
]


LENGTH = 64
BATCH = {"tokens": 2 * LENGTH, "sequence": LENGTH}


def conversations(path: Path, talks: list[list[tuple[str, str]]] = TALKS) -> Path:
    made = [Conversation(tuple(Message(*said) for said in talk), f"{number}", "test") for number, talk in enumerate(talks)]
    path.write_text("".join(json.dumps(conversation.as_json()) + "\n" for conversation in made))
    return path


def preparation(folder: Path, **changes: Any) -> Preparation:
    recipe = runs.recipe(folder, **changes)
    (recipe.out / "work" / "tmp").mkdir(parents=True, exist_ok=True)
    return Preparation(recipe, Progress(1, quiet=True), quiet=True)


def talks(folder: Path, **changes: Any) -> Any:
    source = {"kind": "conversations", "paths": [str(conversations(folder / "talks.jsonl"))]}
    return preparation(folder, data={"train": [source | changes]}, batch=BATCH)


AROUND = {  # what a template has the assistant generate around its text
    "chatml": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "qwen": ("", "<|im_end|>"),
    "phi": ("<|assistant|>", "<|end|>"),
    "bare": ("", ""),
}


@pytest.mark.parametrize("shape", AROUND)
def test_exactly_the_answers_and_their_ends_are_trained(shape: str, tmp_path: Path) -> None:
    """Read back from the batches: the text of every run of trained targets is an answer with the token that ends it."""
    tokenizer = shapes.tokenizer(shape)
    (source,), _ = talks(tmp_path).sources(tokenizer)
    batches = list(passage(source, runs.recipe(tmp_path, batch=BATCH).batch))
    before, after = AROUND[shape]
    answers = sorted(text for batch in batches for text in trained_texts(batch, tokenizer))
    assert answers == sorted(f"{before}{said}{after}" for said in ("where is the thing?", "then", "this one, then"))
    assert sum(batch.weight for batch in batches) < sum(batch.num_tokens for batch in batches)


def trained_texts(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    found, weights, targets = [], batch.weights_T.tolist(), batch.targets_T.tolist()
    for start, stop in pairwise(batch.starts):
        edges = [i for i in range(start, stop + 1) if (i < stop and weights[i]) != (i > start and bool(weights[i - 1]))]
        found += [tokenizer.decode(targets[a:b], skip_special=False) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"kind": "conversations", "paths": [str(conversations(tmp_path / "talks.jsonl"))]}
    recipe = runs.recipe(tmp_path, data={"train": [source]}, batch=BATCH)
    (recipe.out / "work" / "tmp").mkdir(parents=True)
    Preparation(recipe, Progress(1)).sources(runs.tokenizer())
    said = capsys.readouterr().err
    assert "talks: 3 of 5 sequences are left out" in said
    for reason in ("1 longer than 64 tokens", "1 without anything to train", "1 refused by the chat template"):
        assert reason in said


def test_long_conversations_may_be_cut(tmp_path: Path) -> None:
    (source,), _ = talks(tmp_path, too_long="cut").sources(runs.tokenizer())
    assert source.documents.lengths.tolist()[-1] == LENGTH + 1 and len(source.documents) == 3


def test_conversations_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*absent\.jsonl; make conversations with: gemel data sft"):
        preparation(tmp_path, data={"train": [{"kind": "conversations", "paths": ["absent.jsonl"]}]}, batch=BATCH).sources(runs.tokenizer())


def test_conversations_are_tokenized_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = talks(tmp_path).sources(runs.tokenizer())[0][0].documents
    with monkeypatch.context() as patch:
        patch.setattr("gemel.train.prepare.encode_turns", lambda *args: pytest.fail("tokenized again"))
        assert talks(tmp_path).sources(runs.tokenizer())[0][0].documents.fingerprint == first.fingerprint
    again = talks(tmp_path)
    conversations(tmp_path / "talks.jsonl", TALKS[:2])
    assert again.sources(runs.tokenizer())[0][0].documents.fingerprint == first.fingerprint  # what was dropped changes nothing
    conversations(tmp_path / "talks.jsonl", TALKS[1:])
    assert again.sources(runs.tokenizer())[0][0].documents.fingerprint != first.fingerprint


def test_sources_without_anything_are_refused(tmp_path: Path) -> None:
    path = conversations(tmp_path / "talks.jsonl", TALKS[3:])
    with pytest.raises(ConfigError, match="no conversation of talks can be trained: 1 without anything"):
        preparation(tmp_path, data={"train": [{"kind": "conversations", "paths": [str(path)]}]}).sources(runs.tokenizer())
    path.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match=r"line 1 is no conversation .*gemel data sft"):
        preparation(tmp_path, data={"train": [{"kind": "conversations", "paths": [str(path)]}]}).sources(runs.tokenizer())


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written with another tokenizer"):
        preparation(tmp_path).sources(shapes.tokenizer(kind="prepend"))


def test_two_sources_need_two_names(tmp_path: Path) -> None:
    source = {"kind": "shards", "path": str(tmp_path / "shards")}
    with pytest.raises(ConfigError, match=r"2 sources of .* called 'shards'"):
        preparation(tmp_path, data={"train": [source, source]}).sources(runs.tokenizer())
    training, _ = preparation(tmp_path, data={"train": [source, source | {"name": "b", "weight": 2.0}]}).sources(runs.tokenizer())
    loader = Loader(training, runs.recipe(tmp_path).batch)
    taken = [next(loader).position for _ in range(3)][-1]
    assert abs(taken["b"]["taken"] - 2 * taken["shards"]["taken"]) < runs.SEQUENCE < taken["shards"]["taken"]  # an epoch's end is shorter


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, Any]:
    """Text files, the data recipe that reads them, and what a training recipe says to learn from them."""
    rng = np.random.default_rng(0)
    words = ["the", "thing", "in", "there", "here", "then", "other"]
    (tmp_path / "a.txt").write_text("\n".join(" ".join(rng.choice(words, 30)) for _ in range(200)))
    lines = ["[input]", 'kind = "text"', f'paths = ["{tmp_path}/a.txt"]', r'separator = "\n"', "[output]", 'kind = "jsonl"']
    (tmp_path / "words.toml").write_text("\n".join([*lines, "[run]", 'kind = "local"', "workers = 1"]))
    return {
        "data": {"train": [{"kind": "documents", "recipe": str(tmp_path / "words.toml")}], "holdout": 0.1},
        "tokenizer": {"kind": "learnt", "config": {"vocab_size": 275}},
    }


def test_from_text_to_a_model_with_a_tokenizer_of_its_own(corpus: dict[str, Any], tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, steps=30, model__config__vocab_size=275, **corpus)
    result = run(recipe, quiet=True)
    assert result.validation_loss is not None and result.validation_loss < 4.0 < np.log(275)
    tokenizer = Tokenizer.load(tmp_path / "out" / "latest")
    assert tokenizer.vocab_size == 275 and tokenizer.decode(tokenizer.encode("the other thing")) == "the other thing"
    assert tokenizer.eos_id == tokenizer.token_id("<|endoftext|>")
    training, (held,) = Preparation(recipe, Progress(1, quiet=True), quiet=True).sources(tokenizer)
    assert (len(training[0].documents), len(held.documents)) == (180, 20)
    assert all(held.documents[number][-1] == tokenizer.eos_id for number in range(20))


def test_a_folder_may_move_and_stale_things_are_made_anew(corpus: dict[str, Any], tmp_path: Path) -> None:
    """A run goes on from another place; another vocabulary, or other text, is not taken for the old one."""
    recipe = runs.recipe(tmp_path, steps=2, model__config__vocab_size=275, **corpus)
    run(recipe, quiet=True)
    recipe.out.rename(tmp_path / "moved")
    moved = recipe.model_copy(update={"out": tmp_path / "moved", "steps": 3})
    assert run(moved, quiet=True).step == 3
    smaller = {**corpus, "tokenizer": {"kind": "learnt", "config": {"vocab_size": 270}}}
    num_tokens = []
    for values in (corpus, smaller):
        preparing = preparation(tmp_path, **values)
        tokenizer = preparing.tokenizer()
        assert tokenizer.vocab_size == values["tokenizer"]["config"]["vocab_size"]
        num_tokens.append(preparing.sources(tokenizer)[0][0].documents.lengths.sum())
    assert num_tokens[0] < num_tokens[1]


def test_text_of_which_nothing_is_left_is_named(corpus: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "words.toml"
    path.write_text(path.read_text() + '\n[[step]]\nkind = "length"\nmin_chars = 100000\n')
    with pytest.raises(ConfigError, match=r"cleaning .*words.toml leaves nothing of its input; see why with: gemel data inspect \S+/text/"):
        preparation(tmp_path, **corpus).tokenizer()


def test_a_task_that_fails_is_a_mistake_to_mend(corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise TaskFailed("its worker died")

    monkeypatch.setattr("gemel.data.run.start.run", fails)
    with pytest.raises(ConfigError, match="its worker died; the same command goes on from there"):
        preparation(tmp_path, **corpus).tokenizer()


def test_ctrl_c_during_the_last_task_ends_the_run(corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task comes to its end, and nothing else begins."""
    do = Workers.do

    def pressed(self: Workers, *args: Any) -> None:
        do(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Workers, "do", pressed)
    with pytest.raises(Interrupted):
        preparation(tmp_path, **corpus).tokenizer()
    assert (tmp_path / "out" / "text" / "words" / "manifest.json").exists()


def test_text_needs_a_recipe_that_writes_text(corpus: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "words.toml"
    path.write_text(path.read_text().replace('"jsonl"', '"parquet"'))
    with pytest.raises(ConfigError, match=r"writes parquet, but text in JSON lines is needed: set output.kind = 'jsonl' there"):
        preparation(tmp_path, **corpus).tokenizer()
    path.write_text(path.read_text().replace('"parquet"', '"jsonl"'))
    preparation(tmp_path, **corpus).tokenizer()
