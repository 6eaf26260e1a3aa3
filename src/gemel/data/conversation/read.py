"""From a row of a data set to conversations, whatever shape it has; or to a named reason why there is none in it.

Shapes, tried in this order: a better and a worse answer (pairs, also as transcripts "\\n\\nHuman: ..."), messages (OpenAI, ShareGPT,
agent traces, lists of parts), and question and answer (prompt/response, Alpaca with input and history, Self-Instruct with instances). Every
row is looked at on its own, so one file may mix them.

What is mended is counted in `metadata["counts"]` under `repaired.*`; what is not known stays in the metadata under its own name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemel.config.data.conversation import DataSet
from gemel.data.conversation import columns
from gemel.data.conversation.messages import Broken, Repairs, message_list, tool_list, transcript
from gemel.data.document import Document, Dropped
from gemel.tokenizer.conversation import Conversation, Json, Message

MAX_DETAIL_CHARS = 200


def conversations(
    row: Json | list[Any], data_set: DataSet, source: str, place: str, repairs: Sequence[str] = ()
) -> list[Conversation | Dropped]:
    """What a row says; mostly one conversation. Never empty. `repairs` are those that it needed before."""
    counts = Repairs(repairs)
    known: Json = {"messages": row}  # a list is messages without anything around them
    rest: Json = {}
    try:
        if isinstance(row, dict):
            known, rest = columns.named(row, data_set.columns)
        name = known.pop("id", None)
        made = _read(known, data_set, counts)
    except Broken as broken:
        return [_dropped(row, source, place, broken)]
    metadata = rest | ({"counts": dict(counts)} if counts else {})
    base = place if name is None or name == "" else str(name)
    names = [base] if len(made) == 1 else [f"{base}#{number}" for number in range(1, len(made) + 1)]
    return [
        replace(found, id=name, source=source, metadata={**metadata, **found.metadata}) for found, name in zip(made, names, strict=True)
    ]


def _dropped(row: object, source: str, place: str, broken: Broken) -> Dropped:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return Dropped(Document(text, place, source), broken.reason, broken.detail[:MAX_DETAIL_CHARS])


def _read(known: Json, data_set: DataSet, counts: Repairs) -> list[Conversation]:
    tools = tool_list(known.get("tools"), counts)
    question = known.get("instruction")
    if not _filled(known, "messages") and isinstance(question, list) and any(isinstance(part, dict | list) for part in question):
        known = {**known, "messages": question, "instruction": None}
    if _filled(known, "rejected") and (_filled(known, "chosen") or _filled(known, "output")):
        return [_pair(known, tools, data_set, counts)]
    if isinstance(known.get("instances"), list):
        return _instances(known, tools, data_set, counts)
    if "messages" in known and not (known["messages"] in (None, "", []) and _filled(known, "instruction")):
        spoken = _started(message_list(known["messages"], data_set, counts), known, data_set, counts)
        unused = _unused(known)
        if spoken[-1].role != "assistant" and "output" in unused:
            spoken.append(Message("assistant", _text(unused.pop("output"), "output", counts)))
        return [replace(_finished(spoken, tools, _label(known), counts), metadata=unused)]
    if not _filled(known, "output") and isinstance(question, str) and (spoken := transcript(question)):
        return [_finished(_started(spoken, known, data_set, counts), tools, _label(known), counts)]
    if not known.keys() & {"instruction", "input", "output"}:
        raise Broken("sft.unknown_columns", "no column that looks like messages, instruction or output; name them in a [[dataset]] table")
    return [_alpaca(known, tools, data_set, counts)]


def _unused(known: Json) -> Json:
    """Columns beside a whole conversation: kept, so that nothing is lost without a trace."""
    return {name: known[name] for name in ("instruction", "input", "history", "output") if _filled(known, name)}


def _filled(known: Json, name: str) -> bool:
    value = known.get(name)
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def _alpaca(known: Json, tools: tuple[Json, ...], data_set: DataSet, counts: Repairs) -> Conversation:
    """instruction, input, output, history, system: all but the output may be missing in some way."""
    before = [*_started([], known, data_set, counts), *_history(known.get("history"), data_set, counts)]
    question = _question(known, counts)
    if not _filled(known, "output"):
        raise Broken("sft.no_output", "the answer is " + ("empty" if "output" in known else "missing"))
    if not question:
        raise Broken("sft.no_instruction", "neither instruction nor input say anything")
    spoken = [*before, Message("user", question), Message("assistant", _text(known["output"], "output", counts))]
    return _finished(spoken, tools, _label(known), counts)


def _question(known: Json, counts: Repairs) -> str:
    """The instruction and what it is about."""
    instruction, about = (_text(known.get(name), name, counts).strip() for name in ("instruction", "input"))
    if about and columns.says_nothing(about):
        counts.add("repaired.placeholder_input")
        about = ""
    if not instruction and about:
        counts.add("repaired.input_as_instruction")
        return about
    if "input" not in known:
        counts.add("repaired.absent_input")
    return f"{instruction}\n{about}" if about else instruction


def _instances(known: Json, tools: tuple[Json, ...], data_set: DataSet, counts: Repairs) -> list[Conversation]:
    """Self-Instruct: one instruction with several inputs and outputs."""
    made = []
    for instance in known["instances"]:
        fields = columns.named(instance, data_set.columns)[0] if isinstance(instance, dict) else {}
        made.append(_alpaca({"instruction": known.get("instruction"), "system": known.get("system"), **fields}, tools, data_set, counts))
    if not made:
        raise Broken("sft.no_output", "the row has no instances")
    return made


def _pair(known: Json, tools: tuple[Json, ...], data_set: DataSet, counts: Repairs) -> Conversation:
    """What both answers follow, and the answers."""
    better, worse = (_side(known.get(name), data_set, counts) for name in ("chosen", "rejected"))
    if not better:
        better = [Message("assistant", _text(known["output"], "output", counts))]
    num_shared = 0
    while num_shared < min(len(better), len(worse)) - 1 and better[num_shared] == worse[num_shared]:
        num_shared += 1
    shared, better, worse = better[:num_shared], better[num_shared:], worse[num_shared:]
    prompt = _started([], known, data_set, counts)
    if _filled(known, "messages"):
        prompt = _started(message_list(known["messages"], data_set, counts), known, data_set, counts)
        shared = [] if shared and prompt[-len(shared) :] == shared else shared
    elif not any(message.role == "user" for message in shared):
        prompt += _history(known.get("history"), data_set, counts)
        question = _question(known, counts)
        prompt += [Message("user", question)] if question else []
    prompt += shared
    if any(message.role == "user" for message in (*better, *worse)):
        raise Broken("sft.pair_diverges_early", "the two conversations differ before the last answer")
    if not prompt or all(message.role != "user" for message in prompt):
        raise Broken("sft.no_instruction", "the pair has no question")
    if not all(message.content or message.tool_calls for message in (better[-1], worse[-1])):
        raise Broken("sft.no_output", "one answer of the pair is empty")
    if better == worse:
        raise Broken("sft.pair_is_equal", "both answers are the same")
    unused = {"output": known["output"]} if _filled(known, "output") and known["output"] != better[-1].content else {}
    return Conversation(tuple(prompt), "", "", tools, tuple(better), tuple(worse), _label(known), unused)


def _side(value: Any, data_set: DataSet, counts: Repairs) -> list[Message]:
    """One answer of a pair: a text, a transcript, a message, or a list of these."""
    if value in (None, "", [], {}):
        return []
    if isinstance(value, str):
        return transcript(value) or [Message("assistant", value)]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [Message("assistant", value[0])]
    return message_list(value, data_set, counts)


def _started(spoken: list[Message], known: Json, data_set: DataSet, counts: Repairs) -> list[Message]:
    """With the system prompt of the row, or of the data set, in front where there is none."""
    system = _text(known.get("system"), "system", counts) or data_set.system
    if system and not (spoken and spoken[0].role == "system"):
        return [Message("system", system), *spoken]
    return spoken


def _history(value: Any, data_set: DataSet, counts: Repairs) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise Broken("sft.bad_history", f"a text that is no JSON: {value[:60]!r}") from None
    if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        return [Message(role, str(text)) for turn in value for role, text in zip(("user", "assistant"), turn, strict=True)]
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return message_list(value, data_set, counts)
    raise Broken("sft.bad_history", f"neither pairs nor messages: {str(value)[:60]}")


def _label(known: Json) -> bool | None:
    value = known.get("label")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise Broken("sft.bad_label", f"label = {value!r} is neither true nor false")


def _text(value: Any, name: str, counts: Repairs) -> str:
    """A column as text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        counts.add("repaired.list_of_lines")
        return "\n".join(value)
    if isinstance(value, int | float | bool):
        counts.add("repaired.number_as_text")
        return str(value)
    raise Broken("sft.not_text", f"{name} is a {type(value).__name__}: {str(value)[:60]}")


def _finished(spoken: Sequence[Message], tools: tuple[Json, ...], label: bool | None, counts: Repairs) -> Conversation:
    """Without what cannot be learnt from: questions after the last answer, and answers before the first question."""
    messages = list(spoken)
    while messages and messages[-1].role != "assistant":
        messages.pop()
        counts.add("repaired.trailing_question")
    if not messages:
        raise Broken("sft.no_answer", "the assistant says nothing")
    if all(message.role != "user" for message in messages):
        raise Broken("sft.no_instruction", "the user says nothing")
    first = next(index for index, message in enumerate(messages) if message.role == "user")
    for index, message in enumerate(messages):
        empty = not (message.content.strip() or message.tool_calls)
        if message.trained and (index < first or empty):
            messages[index] = replace(message, train=False)
            counts.add("repaired.leading_answer" if index < first else "repaired.empty_answer")
    if not any(message.trained for message in messages):
        raise Broken("sft.no_answer", "all answers are empty")
    return Conversation(tuple(messages), "", "", tools, label=label)
