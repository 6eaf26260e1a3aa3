from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from gguf.constants import Keys, TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.tokenizer.gguf import PRE_TOKENIZERS, read_metadata
from gemel.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.shapes import CHATML, PLAIN_ADDED, SPECIAL, byte_level_library, sentencepiece_library, split_regex

TEXTS = [
    "It's 2024: wörld\n\n  def f(x):\n\treturn x+123  ",
    "DON'T stop 😀 日本語!!! \u00a0x",
    "e\u0301 <tool_call> 1234567",
    " leading",
    "",
]


def write(path: Path, library: tokenizers.Tokenizer, pre: str, **extra: bool | int) -> Path:
    """A GGUF file with the vocabulary of `library` and no tensors."""
    state = json.loads(library.to_str())
    ids = library.get_vocab(with_added_tokens=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    kind = (
        dict.fromkeys(ids, TokenType.NORMAL)
        | dict.fromkeys(SPECIAL, TokenType.CONTROL)
        | dict.fromkeys(PLAIN_ADDED, TokenType.USER_DEFINED)
    )
    writer.add_token_types([kind[token] for token in sorted(ids, key=lambda token: ids[token])])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_eot_token_id(ids["<|im_end|>"])
    writer.add_chat_template(CHATML)
    for name, value in extra.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_metadata_is_what_the_package_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", byte_level_library(), "smollm", add_add_bos_token=True, add_context_length=77)
    metadata = read_metadata(path)
    fields = {key: field for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    assert metadata == {key: field.contents() for key, field in fields.items()}


@pytest.mark.parametrize("kept", [0, 3, 10, 30, 200, 4000])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "a.gguf", byte_level_library(), "smollm")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        read_metadata(path)


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(CheckpointError, match="not GGUF"):
        Tokenizer.load(tmp_path / "a.gguf")


# The splits that the models named ship in their tokenizer.json, written once more.
SPLIT = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
ORIGINALS = {
    "gpt-2": GPT2,
    "default": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "llama-bpe": pre_tokenizers.Sequence([split_regex("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + SPLIT.replace("DIGITS", "1,3")), BYTES]),
    "qwen2": pre_tokenizers.Sequence([split_regex("(?i:'s|'t|'re|'ve|'m|'ll|'d)" + SPLIT.replace("{DIGITS}", "")), BYTES]),
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_the_pre_tokenizer_that_the_file_names_is_built(tmp_path: Path, pre: str) -> None:
    library = byte_level_library()
    library.pre_tokenizer = ORIGINALS[pre]
    if pre == "qwen2":
        library.normalizer = normalizers.NFC()
    ours = Tokenizer.load(write(tmp_path / "a.gguf", library, pre))
    for text in TEXTS:
        assert ours.encode(text, add_bos=False) == library.encode(text, add_special_tokens=False).ids


def test_ids_names_and_template_come_from_the_file(tmp_path: Path) -> None:
    library = byte_level_library()
    ours = Tokenizer.load(write(tmp_path / "a.gguf", library, "smollm"))
    assert ours.special_ids == {library.token_to_id(token) for token in SPECIAL}
    assert (ours.bos_id, ours.eos_id) == (library.token_to_id("<s>"), library.token_to_id("</s>"))
    assert ours.eos_ids == (ours.eos_id, library.token_to_id("<|im_end|>"))
    assert ours.vocab_size == library.get_vocab_size()
    assert ours.templates == {"default": CHATML}


@pytest.mark.parametrize(
    ("pre", "said", "want"), [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True), ("llama-bpe", False, False)]
)
def test_bos_is_as_the_file_says_or_as_its_kind_does(tmp_path: Path, pre: str, said: bool | None, want: bool) -> None:
    extra = {} if said is None else {"add_add_bos_token": said}
    ours = Tokenizer.load(write(tmp_path / "a.gguf", byte_level_library(), pre, **extra))
    assert (ours.encode("a")[0] == ours.bos_id) is want


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'tekken'.*smollm"):
        Tokenizer.load(write(tmp_path / "a.gguf", byte_level_library(), "tekken"))
    assert "tekken" not in PRE_TOKENIZERS


def test_sentencepiece_merges_come_from_scores(tmp_path: Path) -> None:
    library = sentencepiece_library()
    state = json.loads(library.to_str())["model"]
    vocabulary = sorted(state["vocab"], key=lambda token: state["vocab"][token])
    order = ["".join(pair) for pair in state["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([-float(order.index(token)) if token in order else -1e9 for token in vocabulary])
    kind = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    writer.add_token_types([kind.get(token, TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL) for token in vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = Tokenizer.load(tmp_path / "a.gguf")
    for text in ["the thin in  the é😀", " in", "<s>the</s>", ""]:
        plain = library.encode(text, add_special_tokens=False) if "<s>" not in text else None
        assert ours.decode(ours.encode(text)) == text
        assert ours.encode(text)[0] == ours.bos_id == 1
        assert plain is None or ours.encode(text, add_bos=False) == plain.ids
    assert not {1, 2} & set(ours.encode("<s>the</s>", add_bos=False))
    assert isinstance(library.model, models.BPE)
    assert isinstance(library.decoder, decoders.Sequence)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=Keys.Tokenizer.LIST):
        Tokenizer.load(tmp_path / "a.gguf")
