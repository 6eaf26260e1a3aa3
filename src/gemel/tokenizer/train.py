"""Training a byte-level BPE tokenizer that every library can load.

rustbpe learns which pairs of tokens to merge, the way GPT-4's tokenizer was made, in half the time of `tokenizers`. It returns tokens in
the order in which they were made and not the merges, but these follow: BPE is deterministic, so that spelling a token with the older ones
alone ends in the very two parts that were merged. With them the tokenizer is written as tokenizer.json, and from there on `tokenizers` is
the reference for what it means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import tokenizers

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.config.tokenizer import NUM_BYTES, TrainConfig
from gemel.tokenizer.spelling import spell
from gemel.tokenizer.tokenizer import Tokenizer

Merge = tuple[bytes, bytes]


def train(texts: Iterable[str], config: TrainConfig | None = None) -> Tokenizer:
    """Learn a vocabulary from `texts`, which are read once. The same texts in the same order give the same tokenizer.

    Needs memory for every different word, about 1 GB for 100 MB of mixed text. Raises ConfigError when the text is too little for the
    vocabulary, or not valid Unicode.
    """
    config = config or TrainConfig()
    learnt = _learn(texts, config) if config.num_merges else []
    merges = list(parents(learnt))
    tokens = [bytes([byte]) for byte in range(NUM_BYTES)] + learnt
    library = _library(tokens, merges, config)
    return Tokenizer(library, config.named, {"default": config.chat_template} if config.chat_template else {})


def _learn(texts: Iterable[str], config: TrainConfig) -> list[bytes]:
    """The learnt tokens, oldest first."""
    try:
        import rustbpe
    except ImportError:
        raise UnsupportedError("training a tokenizer needs rustbpe: pip install 'gemel[data]'") from None
    trainer = rustbpe.Tokenizer()
    try:
        trainer.train_from_iterator(texts, NUM_BYTES + config.num_merges, pattern=config.pattern)
    except UnicodeEncodeError as error:
        place = f"U+{ord(error.object[error.start]):04X} at character {error.start}"
        raise ConfigError(f"a text is not valid Unicode (unpaired surrogate {place}); decode it with errors='replace'") from None
    except ValueError as error:
        if "regex" not in str(error):
            raise  # of the iterator
        raise ConfigError(f"pattern = {config.pattern!r}: {error}; it must be a regular expression with \\p{{L}} and the like") from None
    learnt: list[bytes] = [bytes(token) for token, rank in trainer.get_mergeable_ranks() if rank >= NUM_BYTES]
    if len(learnt) < config.num_merges:
        fits = NUM_BYTES + len(learnt) + len(config.special_tokens)
        raise ConfigError(f"vocab_size = {config.vocab_size}, but the text has pairs for {fits} only; give more text or lower it")
    return learnt


def parents(learnt: Iterable[bytes]) -> Iterator[Merge]:
    """The two tokens that each token was merged from; `learnt` in the order of learning."""
    ranks = {bytes([byte]): byte for byte in range(NUM_BYTES)}
    for token in learnt:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        yield halves[0] if len(halves) == 1 else _halves(token, ranks)
        ranks[token] = len(ranks)


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> Merge:
    """Spell `token` with what is older than it: the oldest merge first, and of several places the leftmost."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = min(range(len(joined)), key=joined.__getitem__)
        assert joined[at] < len(ranks), f"{token!r} cannot be merged from older tokens"
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _library(tokens: list[bytes], merges: list[Merge], config: TrainConfig) -> tokenizers.Tokenizer:
    vocabulary = {spell(token): index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens), "the trainer made one token twice"
    if clash := sorted(set(config.special_tokens) & vocabulary.keys()):
        raise ConfigError(f"special_tokens has {clash!r}, which is an ordinary token of this vocabulary; choose a text such as '<|end|>'")
    specials = {text: len(tokens) + index for index, text in enumerate(config.special_tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    state = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for text, index in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": config.pattern}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | specials,
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(state))
