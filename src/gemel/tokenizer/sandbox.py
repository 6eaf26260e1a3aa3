"""The process that runs a chat template. Started by `template.py` as a script of its own; it imports nothing of gemel.

A chat template is a program that arrives with a checkpoint. Jinja's sandbox keeps it from touching Python's internals,
but not from looping for ever or from filling the memory, and inside one process nothing else does either: threads
cannot be killed, an exception raised from outside waits for a C call like `'x' * 10**10` or the printing of a list
nested forty deep to end, and signals belong to the main thread. A process can be ended by the kernel at any
instruction. So this one sets a timer on its own CPU time (not on the clock: a busy machine is no reason to fail) whose
default action is death, and a limit on its memory.

Protocol: one JSON object per line. First {"template", "cpu_s", "memory_bytes", "max_chars"}, answered by {} or
{"error"}; then any number of objects with the template's variables, each answered by {"text"} or {"error"}.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser


def compile_template(source: str) -> Template:
    """`source` in an environment that offers what templates on the Hugging Face hub expect."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accepts {% generation %} ... {% endgeneration %}, which marks what a model is trained on and does not change the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = tojson  # jinja's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source)


def render(template: Template, variables: dict[str, Any], max_chars: int) -> str:
    """The text, or ValueError once it is longer than `max_chars`."""
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > max_chars:
            raise ValueError(f"it wrote more than the limit of {max_chars} characters")
    return "".join(pieces)


def _limit_memory(memory_bytes: int) -> None:
    import contextlib
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS knows the limit but refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _answer(**reply: str) -> None:
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
    sys.stdout.buffer.flush()


def _reason(error: Exception, memory_bytes: int) -> str:
    if isinstance(error, MemoryError):
        return f"it needed more than the limit of {memory_bytes >> 20} MiB of memory"
    line = getattr(error, "lineno", None)
    return (str(error) or type(error).__name__) + (f" (line {line})" if line else "")


def main() -> None:
    """Answer until standard input ends."""
    setup = json.loads(sys.stdin.buffer.readline())
    _limit_memory(setup["memory_bytes"])
    signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
    try:
        template = compile_template(setup["template"])  # under the limits: it evaluates constant expressions
    except Exception as error:
        _answer(error=_reason(error, setup["memory_bytes"]))
        return
    _answer()
    signal.setitimer(signal.ITIMER_PROF, 0)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
        try:
            _answer(text=render(template, json.loads(line), setup["max_chars"]))
        except Exception as error:
            _answer(error=_reason(error, setup["memory_bytes"]))
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
