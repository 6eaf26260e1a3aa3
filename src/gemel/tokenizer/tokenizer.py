"""Text to token ids and back, for every model that Gemel loads.

Three rules hold wherever a tokenizer is used:

1.  **Text never becomes special tokens.** `encode` disables them in the library (`encode_special_tokens`) and checks
    the result, because a model's vocabulary may hold a special token's text as an ordinary entry, too. Special tokens
    come from ids, or from a chat template.
2.  **One place decides about BOS**: `encode`. It puts the token before a prompt if the checkpoint asks for it.
    `render_chat` never does; there the template has the say, as in `transformers`. So there are never two. An EOS that
    a checkpoint appends to texts is not added: a prompt is there to be continued.
3.  **A token is a run of bytes.** `token_bytes` is exact for byte-level BPE and for SentencePiece BPE with byte
    fallback; decoding, streaming and log-probability reports are made of it and so cannot disagree. Other kinds of
    decoder are refused when the tokenizer is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from gemel.config.errors import RequestError, UnsupportedError
from gemel.tokenizer import chat
from gemel.tokenizer.special import SpecialToken, SpecialTokens
from gemel.tokenizer.spelling import unspell
from gemel.tokenizer.stream import Detokenizer
from gemel.tokenizer.template import ChatTemplate

SPACE = "\u2581"  # SentencePiece writes a space as this character
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


Step = dict[str, Any]  # one step of a pipeline as tokenizer.json writes it


class Tokenizer:
    """The tokenizer of one checkpoint. Safe to use from several threads.

    `named` maps names as in tokenizer_config.json (bos_token, eos_token...) to token texts, `templates` the names of chat templates
    ("default", "tool_use"...) to their sources. `add_bos` None takes what the library's post-processor does. Tokens in `named` and
    `eos_ids` count as special even where the vocabulary does not say so.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        named: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        eos_ids: Iterable[int] = (),
    ):
        library.no_truncation()
        library.no_padding()
        self.named = {name: text for name, text in (named or {}).items() if library.token_to_id(text) is not None}
        eos_texts = [text for text in map(library.id_to_token, eos_ids) if text is not None]
        library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*self.named.values(), *eos_texts)])
        library.encode_special_tokens = True
        self.library = library
        self._strip, self.byte_level = _decoding(library)
        self._special = SpecialTokens(_special_tokens(library))
        self.special_ids = frozenset(token.id for token in self._special.tokens.values())
        # text that the vocabulary cannot spell becomes "unknown", which is no way to inject anything
        unknown = getattr(library.model, "unk_token", None)
        self._never = self.special_ids - {library.token_to_id(unknown) if unknown else None}
        self.vocab_size: int = library.get_vocab_size()
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *eos_ids]))
        posted = library.encode("").ids
        self.add_bos = self.bos_id is not None and (posted[:1] == [self.bos_id] if add_bos is None else add_bos)
        self._templates = {name: ChatTemplate(source) for name, source in (templates or {}).items()}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a Hugging Face directory with a tokenizer.json, or from a GGUF file. Raises CheckpointError or UnsupportedError."""
        from gemel.tokenizer import files

        return files.load(Path(path))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which `load` and transformers' AutoTokenizer read."""
        from gemel.tokenizer import files

        files.save(self, Path(directory))

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`, none of them special but for the BOS in front that the checkpoint may ask for (`add_bos` False: without).

        Raises RequestError when `text` is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X}"
            raise RequestError(f"the text has an unpaired surrogate ({surrogate}) at character {error.start}; send valid Unicode") from None
        ids = self._encode(text, self.library)
        return [self.bos_id, *ids] if add_bos and self.add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `continues`: they follow a prompt, as in `detokenizer`."""
        stream = Detokenizer(self.bytes_of, self.special_ids if skip_special else (), 0 if continues else self._strip)
        return stream.push(ids) + stream.finish()

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """Text of a sequence that continues a prompt, token by token: a space in front of its first word stays."""
        return Detokenizer(self.bytes_of, self.special_ids if skip_special else ())

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; nothing for ids without a token."""
        return self.bytes_of[token] if 0 <= token < len(self.bytes_of) else b""

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelt `text`, special or not."""
        token: int | None = self.library.token_to_id(text)
        return token

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can be used."""
        return bool(self._templates)

    @property
    def templates(self) -> dict[str, str]:
        """Sources of the chat templates by name."""
        return {name: template.source for name, template in self._templates.items()}

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation. Equal to transformers' `apply_chat_template`, except that no special token comes from a message.

        It may take as long as a template is allowed to (1 s of CPU time): call it outside of an event loop.
        """
        ids: list[int] = []
        for index, piece in enumerate(self.chat_pieces(messages, tools, add_generation_prompt, continue_final_message)):
            ids += [piece] if isinstance(piece, int) else self.encode_piece(piece, first=index == 0)
        return ids

    def chat_pieces(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int | str]:
        """What `render_chat` encodes: ids of the template's special tokens, and the text between them."""
        template = self._template(bool(tools))
        return chat.render(template, self._special, self.named, messages, tools, add_generation_prompt, continue_final_message)

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """Ids of a piece of text that stands at the start (`first`), or behind something else."""
        return self._encode(text, self.library if first else self._continued)

    def warm_up(self) -> None:
        """Do now what the first request would wait for. Raises CheckpointError when a chat template does not compile."""
        assert self.bytes_of
        for template in self._templates.values():
            template.start()

    def _template(self, with_tools: bool) -> ChatTemplate:
        names = ("tool_use", "default") if with_tools else ("default",)
        for name in (*names, *self._templates):
            if name in self._templates:
                return self._templates[name]
        raise RequestError(
            "this model has no chat template: send a prompt as text, or put a chat_template.jinja beside its tokenizer", "messages"
        )

    def _id_of(self, name: str) -> int | None:
        return self.token_id(self.named[name]) if name in self.named else None

    def _encode(self, text: str, library: tokenizers.Tokenizer) -> list[int]:
        encoding = library.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._never.isdisjoint(ids):
            return ids
        # the vocabulary spells a special token as a word of its own: cut that word in two, so that it cannot be whole
        at = next(index for index, token in enumerate(ids) if token in self._never)
        start, end = encoding.offsets[at]
        if end - start < 2:
            raise RequestError(f"{text[start:end]!r} is a special token of this model and cannot be written as text; remove it")
        return self._encode(text[: start + 1], library) + self._encode(text[start + 1 :], self._continued)

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """`token_bytes` of all ids, as a table."""
        vocabulary: dict[str, int] = self.library.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        spell = unspell if self.byte_level else _sentencepiece_spelling
        for token, index in vocabulary.items():
            table[index] = spell(token)
        return table

    @cached_property
    def _continued(self) -> tokenizers.Tokenizer:
        """The same tokenizer for text that is not the start: one that puts a space before the first word only must not do so here."""
        state = json.loads(self.library.to_str()) if isinstance(self.library.pre_tokenizer, _MAY_PREPEND) else {}
        if '"prepend_scheme": "first"' not in json.dumps(state.get("pre_tokenizer")):
            return self.library
        for pre in (state["pre_tokenizer"], *state["pre_tokenizer"].get("pretokenizers", ())):
            if pre.get("prepend_scheme") == "first":
                pre["prepend_scheme"] = "never"
        library = tokenizers.Tokenizer.from_str(json.dumps(state))
        library.encode_special_tokens = True
        return library


_MAY_PREPEND = (pre_tokenizers.Metaspace, pre_tokenizers.Sequence)


def _special_tokens(library: tokenizers.Tokenizer) -> dict[str, SpecialToken]:
    added = library.get_added_tokens_decoder()
    return {
        token.content: SpecialToken(index, token.content, token.lstrip, token.rstrip)
        for index, token in added.items()
        if token.special and token.content
    }


def _decoding(library: tokenizers.Tokenizer) -> tuple[int, bool]:
    """How tokens turn into bytes: (spaces dropped at the start of a text, whether the vocabulary is byte-level). Else UnsupportedError."""
    decoder: Step = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {"type": None}
    steps: list[Step] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return 0, True
    if not all(_keeps_bytes(step) for step in steps):
        raise UnsupportedError(
            f"the tokenizer's decoder is {kinds}; byte-level and SentencePiece BPE (with {SPACE!r} for a space) are supported"
        )
    strips = sum(step["start"] for step in steps if step["type"] == "Strip")
    return strips + sum(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps), False


def _keeps_bytes(step: Step) -> bool:
    """Whether `_sentencepiece_spelling` and dropping leading spaces do what this step of a decoder does."""
    match step["type"]:
        case "ByteFallback" | "Fuse":
            return True
        case "Replace":
            return bool(step["pattern"] == {"String": SPACE} and step["content"] == " ")
        case "Strip":
            return bool(step["content"] == " " and step["stop"] == 0)
        case "Metaspace":
            return bool(step["replacement"] == SPACE)
    return False


def _sentencepiece_spelling(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE, " ").encode()
