"""The tokenizer inside a GGUF file: reading its metadata quickly, and building the pre-tokenizer that the file only names.

`gguf.GGUFReader` makes several numpy views per string, which takes seconds for the 100,000 strings of a vocabulary.
`read_metadata` walks the same header with `struct` in about a tenth of a second; the constants (magic, versions, value
types, key names) are the package's own.

A GGUF file stores the tokens and merges of a byte-level BPE, but of the pre-tokenizer only a name
(`tokenizer.ggml.pre`). `PRE_TOKENIZERS` says what the names mean, as the pipelines that the original models ship in
their `tokenizer.json`. A name that is not there is refused: another split of the text gives other tokens, and a model
that reads them answers worse without any error.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

from gguf.constants import GGUF_MAGIC, GGUFValueType, Keys, TokenType
from gguf.gguf_reader import READER_SUPPORTED_VERSIONS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gemel.config.errors import CheckpointError, UnsupportedError
from gemel.tokenizer.tokenizer import SPACE

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


def read_metadata(path: Path) -> dict[str, Value]:
    """Every key and value in the header of `path`, a little-endian GGUF 2 or 3. Raises CheckpointError for anything else."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a complete GGUF file ({error}); download it again") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(f"{path} cannot be read: {error}") from None


class _Header:
    """A cursor over the key-value part of a GGUF file."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def read(self) -> dict[str, Value]:
        magic, version, _num_tensors, num_keys = self.take("IIQQ")
        if magic != GGUF_MAGIC:
            raise CheckpointError("the first four bytes are not GGUF; it is another kind of file")
        if version not in READER_SUPPORTED_VERSIONS:
            raise CheckpointError(f"GGUF version {version}; versions {READER_SUPPORTED_VERSIONS} in little-endian order can be read")
        return {self.string(): self.value(GGUFValueType(self.take("I")[0])) for _ in range(num_keys)}

    def take(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (num_bytes,) = self.take("Q")
        start, self.at = self.at, self.at + num_bytes
        if self.at > len(self.data):
            raise IndexError(f"a string of {num_bytes} bytes reaches beyond the end")
        return self.data[start : self.at].decode()

    def value(self, kind: GGUFValueType) -> Value:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, length = self.take("IQ")
        if length > len(self.data):
            raise IndexError(f"an array of {length} entries reaches beyond the end")
        if GGUFValueType(item) == GGUFValueType.STRING:
            return [self.string() for _ in range(length)]
        if GGUFValueType(item) == GGUFValueType.ARRAY:
            raise CheckpointError("arrays of arrays in the metadata are not read")
        return list(self.take(f"{length}{_SCALARS[GGUFValueType(item)]}"))


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BLOOM_PATTERN = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "default": _gpt2,
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "llama-bpe": lambda: _split(_LLAMA3_PATTERN),
    "llama3": lambda: _split(_LLAMA3_PATTERN),
    "llama-v3": lambda: _split(_LLAMA3_PATTERN),
    "qwen2": lambda: _split(_QWEN2_PATTERN),
    "deepseek-r1-qwen": lambda: _split(_QWEN2_PATTERN),
    "bloom": lambda: _split(_BLOOM_PATTERN),
}
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def build(metadata: dict[str, Value]) -> Tokenizer:
    """The `tokenizers` pipeline that a GGUF file describes. Control tokens become special added tokens."""
    kind = metadata.get(Keys.Tokenizer.MODEL)
    tokens = _strings(metadata, Keys.Tokenizer.LIST)
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(tokens, metadata)
    else:
        raise UnsupportedError(f"{Keys.Tokenizer.MODEL} = {kind!r}: only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE) are built")
    types = metadata.get(Keys.Tokenizer.TOKEN_TYPE, [TokenType.NORMAL] * len(tokens))
    assert isinstance(types, list)
    # the library gives ids to added tokens by looking them up in the model, so one call in the order of ids keeps every id
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token_type != TokenType.USER_DEFINED, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (TokenType.CONTROL, TokenType.USER_DEFINED) or (token_type == TokenType.UNKNOWN and kind == "llama")
        ]
    )
    return tokenizer


def _strings(metadata: dict[str, Value], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"the GGUF metadata has no list of strings under {key!r}; convert the model again with its tokenizer")
    return [str(item) for item in value]


def _byte_level(tokens: list[str], metadata: dict[str, Value]) -> Tokenizer:
    pre = str(metadata.get(Keys.Tokenizer.PRE, "default"))
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(f"{Keys.Tokenizer.PRE} = {pre!r} is not built (known: {known}); load the Hugging Face directory instead")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(metadata, Keys.Tokenizer.MERGES))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3_NAMES))
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], metadata: dict[str, Value]) -> Tokenizer:
    """SentencePiece BPE: the scores order the merges; text outside the vocabulary falls back to byte tokens."""
    scores = metadata.get(Keys.Tokenizer.SCORES)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"a 'llama' tokenizer needs one score per token under {Keys.Tokenizer.SCORES!r}; convert the model again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, cast("list[float]", scores), strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocabulary and token[cut:] in vocabulary]
        merges += [(-score, vocabulary[left], vocabulary[right], left, right) for left, right in pairs]
    merges.sort()
    unknown = metadata.get(Keys.Tokenizer.UNK_ID, 0)
    assert isinstance(unknown, int)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get(Keys.Tokenizer.ADD_PREFIX, True))
    spaces = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    join = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*join, decoders.Strip(" ", 1, 0)] if prefix else join)
    return tokenizer
