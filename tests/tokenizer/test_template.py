from __future__ import annotations

import datetime
import gc
import time

import pytest

from gemel.config.errors import CheckpointError, RequestError
from gemel.tokenizer.template import MAX_CHARS, ChatTemplate

BOMBS = {
    "nested loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{% set n = namespace(x=10) %}{{ n.x ** (n.x ** 9) }}",
    "a list nested forty deep": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "macros that call each other": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_not_end_is_ended(name: str) -> None:
    template = ChatTemplate(BOMBS[name])
    with pytest.raises((RequestError, CheckpointError), match=r"limit of (1 s of CPU time|512 MiB|8388608 characters)"):
        template.render({})


@pytest.mark.parametrize(
    "source",
    ["{{ 'x' * 10**10 }}", "{{ 'x' * n ** 10 }}", "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ '%999999999d' % 1 }}"],
)
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises((RequestError, CheckpointError), match=r"limit of (512 MiB|\d+ characters)"):
        ChatTemplate(source).render({"n": 10})


def test_the_limits_are_those_stated() -> None:
    template = ChatTemplate("{% for i in range(n) %}{{ 'x' * 1024 }}{% endfor %}")
    assert len(template.render({"n": MAX_CHARS // 1024})) == MAX_CHARS
    with pytest.raises(RequestError, match=str(MAX_CHARS)):
        template.render({"n": MAX_CHARS // 1024 + 1})


def test_after_a_bomb_the_next_conversation_is_rendered() -> None:
    template = ChatTemplate(
        "{% if bomb %}{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}{% endif %}{{ text }}"
    )
    assert template.render({"text": "before"}) == "before"
    with pytest.raises(RequestError, match="CPU time"):
        template.render({"bomb": True})
    assert template.render({"text": "after"}) == "after"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match="failed"):
        ChatTemplate(source).render({"messages": []})


def test_what_templates_expect_is_there() -> None:
    source = """
{%- for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}
{%- generation %} {{ {'b': '<é>', 'a': 1} | tojson }}{% endgeneration %}
{{- {'a': [1]} | tojson(indent=1) }}{{ strftime_now('%Y') }}"""
    year = datetime.datetime.now().year
    assert ChatTemplate(source).render({}) == f'13 {{"b": "<é>", "a": 1}}{{\n "a": [\n  1\n ]\n}}{year}'


def test_errors_name_their_cause() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render({})
    assert caught.value.param == "messages"
    with pytest.raises(CheckpointError, match=r"line 2"):
        ChatTemplate("\n{% if %}").render({})


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("{{ 1 }}")
    template.render({})
    process = template._process
    assert process is not None
    assert process.poll() is None
    del template
    gc.collect()
    deadline_s = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert process.poll() is not None
