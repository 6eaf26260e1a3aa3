"""From a conversation to pieces of text and special ids, such that what people write can never become special tokens.

A template writes `<|im_start|>user` and a message may contain the very same characters; in the rendered string they
look alike, and whoever encodes that string with special tokens enabled lets the message end its own turn. Keeping track
of every character through the template (a `str` subclass that remembers) breaks on the first `tojson`, `split` or `~`.
Cutting the messages out and putting them back breaks templates that trim them or look for `</think>` in them. So
instead:

1.  **Stand-ins.** Before rendering, in every string of the caller, characters from which a special token could be made
    are replaced by private-use characters that occur nowhere in the input, one for one; `in`, `trim`, `length` and
    `tojson` work as before.
2.  **Render.** Special tokens found in the result are the template's own; they become ids. Everything between them gets
    its real characters back and is encoded with special tokens disabled, in whole stretches, so that words merge across
    the seam of template and message exactly as they do in `transformers`.

How much is replaced: the stronger of two ways, unless it changes what the template says and the weaker does not (a
template that writes in small letters leaves a stand-in as it is, either way). *Dense* replaces each character that
begins or ends a special token (`<` and `>`, say), so not even a template that cuts strings apart and joins them can
form one. If that changes the text (the template looks for `<tool_response>`, say), *sparse* replaces only the first
character of each special token, whole or cut off at the end of a string, and the last character of one cut off at the
start, so neighbouring strings cannot form one together either. Roles come from a fixed list because templates build
special tokens out of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from gemel.config.errors import RequestError
from gemel.tokenizer.special import SpecialTokens, StandIns
from gemel.tokenizer.template import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
MAX_DEPTH = 64
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FREE_TEXT = frozenset({"content", "reasoning_content", "thinking"})

Message = dict[str, object]


def render(
    template: ChatTemplate,
    special: SpecialTokens,
    constants: Mapping[str, str],
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> list[int | str]:
    """Ids of the template's special tokens and the text between them, in order.

    `constants`: names and texts of the special tokens that the template may use. `continue_final_message` ends after the text of the final
    message, which must be the assistant's, and adds no generation prompt. Raises RequestError for messages or tools that are not as the
    OpenAI API defines them, and for what the template refuses.
    """
    spoken, offered = _checked_messages(messages, continue_final_message), _checked_tools(tools)
    stand_ins = StandIns(_all_text(spoken, offered) + template.source)
    tag = stand_ins.fresh() if continue_final_message else ""
    fixed = {**constants, "documents": None, "add_generation_prompt": add_generation_prompt and not continue_final_message}

    def say(messages: Sequence[Message], tools: object) -> str:
        if tag:
            # whether the space after the tag survives tells whether the template trims, and would have trimmed the end of the message
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{tag} "}]
        text = template.render({**fixed, "messages": messages, "tools": tools})
        return _up_to(tag, text) if tag else text

    def hide(value: object, dense: bool, key: str = "") -> object:
        if key == "role":
            return value
        return _map_strings(value, lambda text: special.hide(text, stand_ins, dense=dense, free=key in _FREE_TEXT))

    def hidden(dense: bool) -> tuple[list[Message], object]:
        return [{key: hide(value, dense, key) for key, value in message.items()} for message in spoken], hide(offered, dense)

    text = _say_hidden(say, hidden, stand_ins, (spoken, offered))
    return [piece if isinstance(piece, int) else stand_ins.restore(piece) for piece in special.split(text)]


def _say_hidden(
    say: Callable[[list[Message], object], str],
    hidden: Callable[[bool], tuple[list[Message], object]],
    stand_ins: StandIns,
    plain: tuple[list[Message], object],
) -> str:
    """The rendered text, still with stand-ins: dense ones unless they change what the template says and sparse ones do not."""
    dense = hidden(True)
    if dense == plain:
        return say(*plain)
    try:
        text, want = say(*dense), say(*plain)
    except RequestError:
        return say(*hidden(False))  # the template refuses one of the two; the sparse one decides
    if stand_ins.restore(text) == want:
        return text
    weaker = say(*hidden(False))
    return weaker if stand_ins.restore(weaker) == want else text


def _up_to(tag: str, text: str) -> str:
    at = text.rfind(tag)
    if at < 0:
        raise RequestError("the chat template leaves out the final message, so it cannot be continued", param="continue_final_message")
    return text[:at] if text.startswith(" ", at + 1) else text[:at].rstrip()


def _all_text(*values: object) -> str:
    try:
        text = json.dumps(values, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the messages contain an unpaired surrogate (U+{ord(error.object[error.start]):04X}); send valid Unicode", "messages"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages and tools must be plain JSON values: {error}", param="messages") from None
    return text


def _map_strings(value: object, change: Callable[[str], str], depth: int = 0) -> object:
    """`value` with every string in it changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if depth > MAX_DEPTH:
        raise RequestError(f"messages and tools may be nested {MAX_DEPTH} levels deep; flatten them", param="messages")
    if isinstance(value, dict):
        return {change(str(key)): _map_strings(item, change, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change, depth + 1) for item in value]
    return value


def _checked_messages(messages: Sequence[Mapping[str, object]], continue_final_message: bool) -> list[Message]:
    if not messages:
        raise RequestError("messages is empty; send at least one", param="messages")
    checked = [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    final = checked[-1]
    if continue_final_message and (final["role"] != "assistant" or not final.get("content")):
        raise RequestError(
            "continue_final_message needs a final message of the assistant with some content; the final message has "
            f"role {final['role']!r} and content {final.get('content')!r}",
            param="continue_final_message",
        )
    return checked


def _checked_message(message: Mapping[str, object], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is {message!r}; a message is an object with role and content", param=where)
    for key in message:
        if key not in MESSAGE_KEYS:
            raise RequestError(f"{where} has an unknown key {key!r}; known: {', '.join(MESSAGE_KEYS)}", param=f"{where}.{key}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {role!r}; one of {', '.join(ROLES)}", param=f"{where}.role")
    checked = dict(message)
    if "content" in message:
        checked["content"] = _checked_content(message["content"], f"{where}.content")
    if "tool_calls" in message:
        checked["tool_calls"] = _checked_tool_calls(message["tool_calls"], role, f"{where}.tool_calls")
    if checked.get("content") is None and not (role == "assistant" and checked.get("tool_calls")):
        raise RequestError(f"{where} has no content; only an assistant message with tool_calls may leave it out", param=f"{where}.content")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in message and not isinstance(message[key], str):
            raise RequestError(f"{where}.{key} is {message[key]!r}; it must be a string", param=f"{where}.{key}")
    if "name" in message:
        _check_name(message["name"], f"{where}.name")
    if "reasoning_content" in message:
        checked["thinking"] = message["reasoning_content"]  # the name that some templates read
    return checked


def _checked_content(content: object, where: str) -> str | None:
    """Text as it is; a list of text parts as one text, so that no special token can be spread over two of them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} is {content!r}; it must be a string or a list of text parts", param=where)
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(
                f'{where}[{index}] is no text part; this model reads {{"type": "text", "text": "..."}} only', param=f"{where}[{index}]"
            )
        texts.append(text)
    return "".join(texts)


def _checked_tool_calls(calls: object, role: object, where: str) -> list[Message]:
    if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where}: a list of calls, in messages of the assistant only", param=where)
    return [_checked_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _checked_tool_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise RequestError(f'{where} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}', param=where)
    _check_name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's form; templates expect the object
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(f"{where}.function.arguments is not JSON", param=f"{where}.function.arguments") from None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments must be a JSON object", param=f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _checked_tools(tools: Sequence[Mapping[str, object]] | None) -> list[Message] | None:
    if not tools:
        return None
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise RequestError(f'tools[{index}] must be {{"type": "function", "function": {{"name", ...}}}}', param=f"tools[{index}]")
        _check_name(function.get("name"), f"tools[{index}].function.name")
    return [dict(tool) for tool in tools]


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where} is {name!r}; 1 to 64 letters, digits, underscores, dots and dashes", param=where)
