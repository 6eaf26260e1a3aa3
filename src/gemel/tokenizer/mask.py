"""Which tokens of a conversation are trained: exactly those that the assistant would have to generate.

They begin where the prompt ends that a server renders for this turn (the messages before it and the generation prompt), and end with the
token that ends the turn; what the template writes after it, such as a line end, nobody generates. Both places are found by rendering the
conversation up to here and comparing, not by looking for headers, so it holds for every template, with tools, reasoning and system prompts.

Two things can go wrong with a rendered conversation, and both are handled here.

*Tokens across the seam.* If the prompt's last token and the answer's first would merge, the seam stays a token boundary, because the server
ends its prompt there. All other tokens are those of `render_chat`.

*Templates that rewrite the past.* Some leave out the reasoning of earlier turns once the user speaks again. Then no single sequence shows
all turns as they are generated, and `encode_turns` returns several, each training the turns that it shows as the server would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gemel.config.errors import RequestError
from gemel.tokenizer.conversation import Conversation, Json
from gemel.tokenizer.tokenizer import Tokenizer

Pieces = list[int | str]
Place = tuple[int, int]  # in rendered pieces: which one, and how many of its characters lie before


class Encoded(NamedTuple):
    """Token ids, and for each whether it is trained."""

    ids: list[int]
    trained: list[bool]


class _Turn(NamedTuple):
    """One trained message: its index, the conversation rendered up to its end, and from where to where it is generated."""

    message: int
    pieces: Pieces
    start: Place
    end: Place


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> Encoded:
    """The whole conversation as one sequence.

    Raises RequestError if the template refuses it, or rewrites earlier turns that are trained (see `encode_turns`).
    """
    encoded = encode_turns(tokenizer, conversation)
    if len(encoded) > 1:
        raise RequestError(
            f"conversation {conversation.id!r}: the chat template changes earlier turns when later ones follow, so that {len(encoded)} "
            "sequences are needed to train them as they are generated; use encode_turns, or train the last turn alone",
            "messages",
        )
    return encoded[0]


def encode_turns(tokenizer: Tokenizer, conversation: Conversation) -> list[Encoded]:
    """As few sequences as it takes for every trained turn to stand behind the prompt that it is generated from; mostly one.

    The first is the whole conversation. Without trained turns there is nothing trained in it.
    """
    said, tools = [message.as_chat() for message in conversation.messages], list(conversation.tools) or None
    turns = [_turn(tokenizer, conversation.id, said, tools, i) for i, message in enumerate(conversation.messages) if message.trained]
    whole = turns[-1].pieces if turns and turns[-1].message == len(said) - 1 else tokenizer.chat_pieces(said, tools, False)
    encoded: list[Encoded] = []
    while turns or not encoded:
        shown = [turn for turn in turns if _shared(_until(turn.pieces, turn.end), whole)[1]]
        encoded.append(_encode(tokenizer, whole, [(turn.start, turn.end) for turn in shown]))
        turns = [turn for turn in turns if turn not in shown]
        whole = turns[-1].pieces if turns else whole
    return encoded


def _turn(tokenizer: Tokenizer, name: str, said: Sequence[Json], tools: Sequence[Json] | None, index: int) -> _Turn:
    if index == 0:
        raise RequestError(
            f"conversation {name!r} starts with the assistant, which has no prompt to be generated from; set its train to false", "messages"
        )
    pieces = tokenizer.chat_pieces(said[: index + 1], tools, False)
    prompt = tokenizer.chat_pieces(said[:index], tools, True)
    start, whole = _shared(prompt, pieces)
    if not whole:
        # a generation prompt may say more than the header (`<think>`, say); then the header is what both have behind the earlier messages
        before, unchanged = _shared(tokenizer.chat_pieces(said[:index], tools, False), pieces)
        if not unchanged or start < before:
            raise RequestError(f"conversation {name!r}: message {index} is rendered so that no prompt leads up to it", "messages")
    return _Turn(index, pieces, start, _end(pieces, start))


def _end(pieces: Pieces, start: Place) -> Place:
    """Behind the token that ends the turn, if nothing but white space follows it; else behind everything."""
    last = len(pieces) - 1
    tail = pieces[last]
    if isinstance(tail, int):
        return last + 1, 0
    if tail.isspace() and (last, 0) > start and isinstance(pieces[last - 1], int):
        return last, 0
    return last, len(tail)


def _shared(left: Pieces, right: Pieces) -> tuple[Place, bool]:
    """How far both are the same, as a place in `right`, and whether that is all of `left`."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            num_chars = _common(a, b) if isinstance(a, str) and isinstance(b, str) else 0
            return (index, num_chars), isinstance(a, str) and num_chars == len(a) and index == len(left) - 1
    return (min(len(left), len(right)), 0), len(left) <= len(right)


def _until(pieces: Pieces, end: Place) -> Pieces:
    index, num_chars = end
    return pieces[: index + 1] if num_chars else pieces[:index]


def _common(left: Sequence[object], right: Sequence[object]) -> int:
    """How many elements both begin with."""
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _encode(tokenizer: Tokenizer, pieces: Pieces, spans: Sequence[tuple[Place, Place]]) -> Encoded:
    encoded = Encoded([], [])
    for index, piece in enumerate(pieces):
        if isinstance(piece, int):
            parts: Iterator[tuple[int, list[int]]] = iter([(0, [piece])])
        else:
            cuts = {offset for span in spans for place, offset in span if place == index and 0 < offset < len(piece)}
            parts = _cut(tokenizer, piece, sorted(cuts), first=index == 0)
        for offset, ids in parts:
            encoded.ids.extend(ids)
            encoded.trained.extend([any(start <= (index, offset) < end for start, end in spans)] * len(ids))
    return encoded


def _cut(tokenizer: Tokenizer, text: str, cuts: Sequence[int], first: bool) -> Iterator[tuple[int, list[int]]]:
    """The ids of a piece in parts that begin at 0 and at `cuts`."""
    base, begin, done = 0, 0, 0  # where the stretch begins that is encoded whole, the part begins, and the part's ids begin
    whole = tokenizer.encode_piece(text, first)
    for cut in cuts:
        before = tokenizer.encode_piece(text[base:cut], first)
        rest = tokenizer.encode_piece(text[cut:], False)
        across = _common(before, whole) < len(before)
        if across and b"".join(map(tokenizer.token_bytes, rest)) == text[cut:].encode():
            # end the prompt as the server does, and go on from there; tokenizers that would put a space there cannot
            yield begin, before[done:]
            whole, base, done, first = rest, cut, 0, False
        else:
            seam = _common(before, whole)
            yield begin, whole[done:seam]
            done = seam
        begin = cut
    yield begin, whole[done:]
