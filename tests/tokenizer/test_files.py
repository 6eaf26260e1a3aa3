from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gemel.config.errors import CheckpointError
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import CHATML, LLAMA3, NAMED, byte_level_library, sentencepiece_library

TEXTS = ["Hello  world 123\n", " the in é😀", "", "<tool_call> x"]
TALK = [{"role": "user", "content": "Hello 12"}]


def write(path: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    byte_level_library().save(str(path / "tokenizer.json"))
    for name, value in {"tokenizer_config": config or {}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("kind", ["byte-level", "prepend", "first"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_what_is_saved_loads_here_and_in_transformers(tmp_path: Path, kind: str, add_bos: bool) -> None:
    library = byte_level_library() if kind == "byte-level" else sentencepiece_library(kind)
    ours = Tokenizer(library, NAMED, {"default": LLAMA3, "tool_use": CHATML}, add_bos, eos_ids=[library.token_to_id("<|im_end|>")])
    ours.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == again.encode(text) == theirs(text)["input_ids"]
        ids = ours.encode(text)
        assert again.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.render_chat(TALK) == again.render_chat(TALK)
    assert ours.render_chat(TALK) == theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert (again.templates, again.named, again.eos_ids, again.special_ids) == (ours.templates, ours.named, ours.eos_ids, ours.special_ids)


def test_names_may_be_texts_or_objects_in_either_file(tmp_path: Path) -> None:
    token = {"content": "<s>", "__type": "AddedToken"}
    ours = Tokenizer.load(write(tmp_path, {"bos_token": token}, special_tokens_map={"eos_token": "</s>", "bos_token": "<|user|>"}))
    assert ours.named == {"bos_token": "<s>", "eos_token": "</s>"}


def test_all_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    one = byte_level_library().token_to_id("<|im_end|>")
    ours = Tokenizer.load(write(tmp_path, {"eos_token": "</s>"}, generation_config={"eos_token_id": [one]}))
    assert ours.eos_ids == (ours.eos_id, one)


def test_templates_come_from_the_config_a_list_or_files(tmp_path: Path) -> None:
    assert Tokenizer.load(write(tmp_path, {"chat_template": "a"})).templates == {"default": "a"}
    named = [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "c"}]
    assert Tokenizer.load(write(tmp_path, {"chat_template": named})).templates == {"default": "b", "tool_use": "c"}
    (tmp_path / "chat_template.jinja").write_text("d")
    assert Tokenizer.load(tmp_path).templates == {"default": "d", "tool_use": "c"}


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory"):
        Tokenizer.load(tmp_path / "absent")
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.model
def test_the_embedded_model_encodes_as_transformers_does(smollm2: Path, tmp_path: Path) -> None:
    source = smollm2 if smollm2.suffix == ".gguf" else smollm2.with_suffix(".gguf")
    if not source.exists():
        pytest.skip(f"{source} is not there; run: gemel pull")
    ours = Tokenizer.load(source)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    @settings(max_examples=100, deadline=None)
    def same(text: str) -> None:
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]

    same()
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?\n"}]
    assert ours.render_chat(talk) == theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.add_bos) == (49152, 1, (2,), False)
