"""Adding tokens to a tokenizer without touching what it does to text that has none of them.

There are two ways, and both keep that promise.

*Given* tokens become added tokens: wherever their text occurs it is one token, and the rest is cut as before. This is what `add_tokens` of
transformers does. *Learnt* tokens continue the tokenizer's own merges on text of the domain. New merges come after all old ones, so a text
is first cut exactly as before, and changes only where a new pair then stands. A pair whose text is an old token already (one that cannot be
reached from here) is passed over: merging it would change texts that have no new token in them.

What the new tokens were made of is returned too. From it a model's embeddings start (`gemel.model.resize`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from gemel.config.errors import ConfigError, UnsupportedError
from gemel.config.tokenizer import ExtendConfig
from gemel.tokenizer.encode import probes
from gemel.tokenizer.spelling import BYTES
from gemel.tokenizer.tokenizer import Tokenizer

_STAND_IN = 0x10000  # old token i is written as this character plus i while new merges are learnt: no white space there, and room for all
_FLAGS = {"lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True)
class Extension:
    """The new tokenizer, and for each new id the old ids that its text had. `known` were one token before."""

    tokenizer: Tokenizer
    pieces: Mapping[int, tuple[int, ...]]
    known: tuple[str, ...]


def extend(old: Tokenizer, config: ExtendConfig, texts: Iterable[str] = ()) -> Extension:
    """Add what `config` says; `texts` are read once if tokens are to be learnt, in memory for their different words.

    Raises ConfigError for a token that cannot be added, and UnsupportedError for a tokenizer that cannot be extended.
    """
    state = json.loads(old.library.to_str())
    if state["model"]["type"] != "BPE":
        raise UnsupportedError(f"a tokenizer of type {state['model']['type']} cannot be extended; BPE can")
    vocabulary: dict[str, int] = state["model"]["vocab"]
    for token in state["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])  # libraries number added tokens anew, unless they are here
    pieces: dict[int, tuple[int, ...]] = {}
    first = next_id = len(old.bytes_of)
    known = []
    for text, special in {**dict.fromkeys(config.tokens, False), **dict.fromkeys(config.special_tokens, True)}.items():
        if _is_known(old, text):
            known.append(text)
            continue
        _check_spelling(old, text, vocabulary)
        whole_words = config.whole_words and not special
        state["added_tokens"].append({"id": next_id, "content": text, "single_word": whole_words, "special": special, **_FLAGS})
        pieces[next_id] = tuple(old.encode(text, add_bos=False))
        vocabulary[text], next_id = next_id, next_id + 1
    for left, right in _learn(old, config, texts, vocabulary) if config.learn else ():
        state["model"]["merges"].append([left, right])
        parts = (vocabulary[left], vocabulary[right])
        pieces[next_id] = tuple(piece for part in parts for piece in pieces.get(part, (part,)))
        vocabulary[left + right], next_id = next_id, next_id + 1
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    new = Tokenizer(library, old.named, old.templates, old.add_bos, old.eos_ids)
    _check(old, new, first)
    return Extension(new, pieces, tuple(known))


def _is_known(old: Tokenizer, text: str) -> bool:
    index = old.token_id(text)
    return index in old.special_ids or len(old.encode(text, add_bos=False)) == 1


def _check_spelling(old: Tokenizer, text: str, vocabulary: Mapping[str, int]) -> None:
    """An added token is written as it reads. In a byte-level vocabulary that may look like other bytes."""
    if text in vocabulary:
        raise ConfigError(f"token {text!r} is how this vocabulary writes another token (id {vocabulary[text]}); choose another text")
    if old.byte_level and not text.isascii() and all(character in BYTES for character in text):
        raise ConfigError(
            f"token {text!r} would be decoded wrong by every library, because a byte-level vocabulary writes other bytes with its letters; "
            f"put a space in front ({' ' + text!r}), or learn it from text (learn)"
        )


def _check(old: Tokenizer, new: Tokenizer, first: int) -> None:
    """The promise, tried: old ids are where they were, texts without new tokens are cut as before, and new tokens come back."""
    if (
        any(new.token_bytes(index) != old.token_bytes(index) for index in range(first))
        or new.special_ids & set(range(first)) != old.special_ids
    ):
        raise UnsupportedError("this tokenizer's library renumbers its tokens when some are added; it cannot be extended")
    for text in probes(old):
        ids = new.encode(text)
        assert max(ids, default=0) >= first or ids == old.encode(text), f"{text!r} has no new token, but is encoded in another way"
    for index in range(first, new.vocab_size):
        around = f"a{new.token_bytes(index).decode(errors='replace')}b"
        if "\ufffd" not in around and new.decode(new.encode(around)) != around:
            raise UnsupportedError(
                f"this tokenizer does not give {around!r} back once {around[1:-1]!r} is a token: it puts a space in front of what follows "
                "an added token; extend a byte-level tokenizer"
            )


def _learn(old: Tokenizer, config: ExtendConfig, texts: Iterable[str], taken: Iterable[str]) -> list[tuple[str, str]]:
    """Merges of old and learnt tokens, as the vocabulary writes them, most frequent first; none that makes one of `taken`."""
    if not old.byte_level:
        raise UnsupportedError("only byte-level tokenizers can go on learning; give a list of tokens instead")
    trainer = trainers.BpeTrainer(vocab_size=old.vocab_size + config.learn, min_frequency=config.min_count, show_progress=False)
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_in_old_tokens(old.library, texts), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]

    def spelt(stand_ins: str) -> str:
        return "".join(str(old.library.id_to_token(ord(character) - _STAND_IN)) for character in stand_ins)

    made, taken = set[str](), set(taken)
    chosen: list[tuple[str, str]] = []
    for left, right in merges:
        known = all(len(part) == 1 or part in made for part in (left, right))
        if not known or spelt(left + right) in taken:
            continue
        made.add(left + right)
        taken.add(spelt(left + right))
        chosen.append((spelt(left), spelt(right)))
        if len(chosen) == config.learn:
            return chosen
    raise ConfigError(
        f"learn = {config.learn}, but the text has only {len(chosen)} new tokens that occur min_count = {config.min_count} times; "
        "give more text, or lower one of them"
    )


def _in_old_tokens(library: tokenizers.Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """Each text as words between spaces, each word as the stand-ins of its old tokens."""
    cache: dict[str, str] = {}
    for text in texts:
        normal = library.normalizer.normalize_str(text) if library.normalizer else text
        words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(normal)]
        for word in words:
            if word not in cache:
                cache[word] = "".join(chr(_STAND_IN + token.id) for token in library.model.tokenize(word))
        yield " ".join([cache[word] for word in words])


def describe(old: Tokenizer, extension: Extension) -> list[dict[str, Any]]:
    """The new tokens for a report: id, text, and the old tokens that the text had."""
    new = extension.tokenizer
    return [
        {
            "id": index,
            "text": new.token_bytes(index).decode(errors="replace"),
            "special": index in new.special_ids,
            "pieces": [old.token_bytes(piece).decode(errors="replace") for piece in pieces],
        }
        for index, pieces in extension.pieces.items()
    ]
