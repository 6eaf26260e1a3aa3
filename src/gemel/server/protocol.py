"""The request bodies, as an OpenAI client sends them plus the usual extensions.

Nothing is silently ignored. A field is supported, or refused with the nearest known name, or refused by name with a reason (`REFUSED`).
Types are checked here, strictly; the bounds on sampling live in one place, `SamplingParams`, which `sampling_params` fills. A `null`
means "not given", as clients send it for every option they do not use. `user` and `metadata` do not change the answer: they are written
to the log line of the request.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from gemel.config.sampling import SamplingParams
from gemel.server.body import Json
from gemel.server.errors import ApiError

MAX_MESSAGES = 4096
MAX_TOOLS = 128
COMPLETION_MAX_TOKENS = 16  # what OpenAI's /v1/completions takes when max_tokens is absent

REFUSED = {
    "audio": "only text is generated",
    "best_of": "use n, or beam_width for a search",
    "echo": "the prompt is not repeated in the answer",
    "function_call": "use tools and tool_choice",
    "functions": "use tools",
    "guided_json": "structured output is not built",
    "modalities": "only text is generated",
    "parallel_tool_calls": "tool calls are not parsed out of the text",
    "prediction": "speculation from a given text is not built",
    "prompt_cache_key": "use cache_salt to keep cached prefixes apart",
    "reasoning_effort": "put it into the prompt in the way the model was trained for",
    "safety_identifier": "use user",
    "service_tier": "use priority",
    "store": "nothing is stored",
    "suffix": "text is only continued at its end",
    "verbosity": "put it into the prompt",
    "web_search_options": "the server fetches nothing",
}

Prompt: TypeAlias = "str | list[int]"
TokenId: TypeAlias = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]  # JSON keys are strings


class Body(BaseModel):
    """A JSON object with known keys of exact types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name in [name for name in given if name not in cls.model_fields]:
            if name in REFUSED and given[name] is False:  # false is what the server does anyway
                del given[name]
                continue
            raise PydanticCustomError("unknown_name", "{reason}", {"reason": _about(cls, name), "name": name})
        return given


def _about(cls: type[Body], name: str) -> str:
    if name in REFUSED:
        return f"{name!r} is not supported: {REFUSED[name]}"
    near = difflib.get_close_matches(name, cls.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(cls.model_fields))}"
    return f"unknown field {name[:80]!r}: {hint}"


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """The call that a model made, `arguments` as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """An earlier call, given back in the history."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn. The fields that are always null or empty here are those that OpenAI's own answers carry and clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: object) -> object:
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError(
                    "not_text", "a part of type {kind} is not supported: this model reads text", {"kind": repr(kind[:40])}
                )
        return content

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise PydanticCustomError("no_content", "a message needs 'content', or 'tool_calls' of an assistant")
        if self.tool_calls is not None and self.role != "assistant":
            raise PydanticCustomError("no_content", "'tool_calls' belong to messages of an assistant")
        return self

    def for_template(self) -> dict[str, JsonValue]:
        """As chat templates expect it: `developer` is OpenAI's newer word for `system`, call arguments are an object."""
        parts = [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []
        content = "".join(part.text for part in parts)
        turn: dict[str, JsonValue] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls is not None:
            turn["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": _object_or_text(c.function.arguments)}}
                for c in self.tool_calls
            ]
        return turn


def _object_or_text(arguments: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


class Function(Body):
    """What a tool does. Shown to the model through the template; `parameters` is a JSON schema and is not enforced."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Literal[False] | None = None


class Tool(Body):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Body):
    """Free text; structured output is not built."""

    type: Literal["text"]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False


class Generation(Body):
    """What chat and plain completions share. The fields named like those of `SamplingParams` mean the same."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    user: Annotated[str, Field(max_length=256)] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, stop: object) -> object:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_agree(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("conflict", "'stream_options' is only for streams: set 'stream' to true or remove it")
        if self.beam_width is not None and self.stream:
            raise PydanticCustomError(
                "conflict", "'beam_width' cannot stream: beams overtake each other until the end; set 'stream' to false"
            )
        return self


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    response_format: ResponseFormat | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _free_choice(cls, choice: object) -> object:
        if choice not in ("none", "auto"):
            raise PydanticCustomError("forced_tool", "a forced tool call is not supported: use 'none' or 'auto'")
        return choice

    @model_validator(mode="after")
    def _chat_options_agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("conflict", "'top_logprobs' needs 'logprobs' to be true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("conflict", "'max_tokens' and 'max_completion_tokens' mean the same: give one")
        if self.continue_final_message and "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
            raise PydanticCustomError(
                "conflict", "'continue_final_message' continues the last turn and 'add_generation_prompt' opens a new one: choose one"
            )
        return self


class CompletionBody(Generation):
    """POST /v1/completions. `prompt` is a text, a list of texts, token ids, or a list of lists of token ids."""

    prompt: JsonValue
    logprobs: int | None = None

    @field_validator("prompt", mode="after")
    @classmethod
    def _prompt_kinds(cls, prompt: JsonValue) -> JsonValue:
        wrong = PydanticCustomError(
            "prompt_kind", "must be a string, a list of strings, a list of token ids or a list of lists of token ids, not empty"
        )
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list) or not prompt:
            raise wrong
        if not (
            _all_ids(prompt) or all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) and p and _all_ids(p) for p in prompt)
        ):
            raise wrong
        return prompt

    @property
    def prompts(self) -> list[Prompt]:
        """One entry per prompt."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return self.prompt  # type: ignore[return-value]  # checked by _prompt_kinds
        return [self.prompt]  # type: ignore[list-item]


def _all_ids(values: list[JsonValue]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values)


class TokenizeBody(Body):
    """POST /tokenize: the ids of a text, or of a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("conflict", "give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", bound=BaseModel)


def parse_body(cls: type[B], value: Json) -> B:
    """`value` as a `cls`. Raises `ApiError` 400 that names the field."""
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)) from None


def sampling_params(body: ChatBody | CompletionBody) -> SamplingParams:
    """The sampling that the body asks for. Raises `ApiError` 400."""
    given: dict[str, object] = {name: getattr(body, name) for name in SamplingParams.model_fields if getattr(body, name, None) is not None}
    if body.top_k == -1:  # what other servers take for "all"
        given["top_k"] = 0
    if isinstance(body, ChatBody):
        given.pop("logprobs", None)
        if body.logprobs:
            given["logprobs"] = body.top_logprobs or 0
        if body.max_completion_tokens is not None:
            given["max_tokens"] = body.max_completion_tokens
    elif body.max_tokens is None:
        given["max_tokens"] = COMPLETION_MAX_TOKENS
    try:
        return SamplingParams.model_validate(given)
    except ValidationError as error:
        renamed = {}
        if isinstance(body, ChatBody):
            renamed = {"logprobs": "top_logprobs"} | (
                {"max_tokens": "max_completion_tokens"} if body.max_completion_tokens is not None else {}
            )
        raise _explain(error.errors(include_url=False), renamed) from None


def _explain(errors: list[ErrorDetails], renamed: dict[str, str] | None = None) -> ApiError:
    first = errors[0]
    loc = [renamed.get(str(part), str(part)) if renamed else part for part in first["loc"] if part != "[key]"]
    if first["type"] == "unknown_name":
        param = _path([*loc, first["ctx"]["name"]])
        return ApiError(400, f"{_path(loc)}: {first['msg']}" if loc else first["msg"], param=param, code="unknown_field")
    param = _path(loc)
    message = first["msg"].removeprefix("Value error, ")
    if not loc:
        return ApiError(400, message)
    if first["type"] == "missing":
        return ApiError(400, f"{param!r} is required.", param=param, code="missing_field")
    if first["type"] in ("not_text", "no_content", "forced_tool", "prompt_kind"):
        return ApiError(400, f"{param}: {message}", param=param, code="unsupported_value")
    return ApiError(400, f"{param} = {_shown(first['input'])}: {message}", param=param, code="invalid_value")


def _path(loc: list[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")[:200]


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."
