"""From bytes that anyone may send to JSON values that the rest of the server may trust.

What comes out has: at most `max_body_bytes`, valid UTF-8 (so no lone surrogates), finite numbers, no duplicate keys, bounded depth. Large
bodies are parsed in a thread: the event loop must keep streaming to everyone else meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from starlette.requests import Request

from gemel.server.errors import ApiError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAX_DEPTH = 64
INLINE_BYTES = 16_384  # above this, parsing takes longer than going to a thread


async def read_json(request: Request, max_bytes: int, timeout_s: float) -> Json:
    """The request's body as JSON. Raises `ApiError` 400, 408 or 413."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > max_bytes:
        raise too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large(max_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {timeout_s:g} s.", code="body_timeout", headers={"Connection": "close"}
        ) from None
    if len(body) <= INLINE_BYTES:
        return parse_json(bytes(body))
    return await asyncio.to_thread(parse_json, bytes(body))


def too_large(max_bytes: int) -> ApiError:
    """413."""
    return ApiError(
        413, f"The body is larger than the server's limit of {max_bytes} bytes; send less or raise max_body_bytes.", code="body_too_large"
    )


def parse_json(body: bytes) -> Json:
    """`json.loads`, without what it lets through. Raises `ApiError` 400."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 (byte {error.start})") from None
    try:
        value: Json = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise _invalid(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python converts
        raise _invalid(str(error)) from None
    _check_depth(value)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")


def _without_duplicates(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:80]!r} occurs twice in one object")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large for a 64-bit float")
    return number


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _invalid(f"it is nested more than {MAX_DEPTH} levels deep")


def _check_surrogates(value: Json) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid("a string holds half of a surrogate pair, which stands for no character") from None
