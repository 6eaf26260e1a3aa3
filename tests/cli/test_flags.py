"""The table of flags against the configuration types: every field has its flag, with its default, and reaches its field."""

from __future__ import annotations

import argparse
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from gemel.cli import flags, model
from gemel.cli.chat import SAMPLING as CHAT_SAMPLING
from gemel.cli.flags import Flag, Words
from gemel.config.base import Config
from gemel.config.engine import DynamicBatching, EngineConfig, StaticBatching
from gemel.config.errors import ConfigError
from gemel.config.sampling import SamplingParams
from gemel.config.server import ServerConfig
from gemel.llm import store

TABLES: list[tuple[tuple[Flag, ...], type[Config]]] = [
    (flags.ENGINE, EngineConfig),
    (flags.SAMPLING, SamplingParams),
    (flags.SERVER, ServerConfig),
]
# What a field needs beside it to mean anything.
ALONG: dict[str, dict[str, object]] = {"length_penalty": {"beam_width": 4}, "weight_group": {"weights": "int4"}}
# A value for every flag, as typed and as the field gets it: other than the default, and valid together with the others.
TYPED = {
    "dtype": ("float32", "float32"),
    "device": ("cpu", "cpu"),
    "threads": ("3", 3),
    "weights": ("int4", "int4"),
    "weight_group": ("64", 64),
    "activations": ("full", "full"),
    "kv": ("int8", "int8"),
    "kernels": ("torch", "torch"),
    "max_context": ("77", 77),
    "max_running": ("5", 5),
    "max_waiting": ("6", 6),
    "max_step_tokens": ("512", 512),
    "block_tokens": ("32", 32),
    "kv_bytes": ("2GiB", 2 * 2**30),
    "prefix_cache": (None, False),
    "cache_salt": ("x", "x"),
    "batching.kind": ("dynamic", "dynamic"),
    "batching.batch_size": ("4", 4),
    "batching.max_wait_s": ("0.5", 0.5),
    "max_tokens": ("9", 9),
    "temperature": ("0.5", 0.5),
    "top_k": ("7", 7),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.5", 1.5),
    "presence_penalty": ("0.25", 0.25),
    "frequency_penalty": ("-0.5", -0.5),
    "logit_bias": ("198=-100,2=1.5", {198: -100.0, 2: 1.5}),
    "seed": ("11", 11),
    "stop": ("END", ("END",)),
    "stop_token_ids": ("2,17", (2, 17)),
    "ignore_eos": (None, True),
    "min_tokens": ("2", 2),
    "logprobs": ("3", 3),
    "n": ("2", 2),
    "beam_width": ("4", 4),
    "length_penalty": ("0.5", 0.5),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "api_key": ("secret", "secret"),
    "allowed_hosts": ("a.example, b.example", ("a.example", "b.example")),
    "max_body_bytes": ("1MB", 1_000_000),
    "max_head_bytes": ("4KiB", 4096),
    "max_outputs": ("4", 4),
    "read_timeout_s": ("2.5", 2.5),
    "keep_alive_s": ("3", 3.0),
    "drain_s": ("0", 0.0),
}


def field(config: type[BaseModel], path: str) -> tuple[object, object]:
    """Annotation and default of the field that a path leads to; the batching policy is a union, any member that has the field will do."""
    if path.startswith("batching."):
        name = path.removeprefix("batching.")
        if name == "kind":
            return Literal["continuous", "static", "dynamic"], EngineConfig().batching.kind
        members = [member for member in (StaticBatching, DynamicBatching) if name in member.model_fields]
        defaults = {member.model_fields[name].default for member in members}
        assert len(defaults) == 1, "one flag cannot stand for two defaults"
        return members[0].model_fields[name].annotation, defaults.pop()
    info = config.model_fields[path]
    return info.annotation, info.get_default(call_default_factory=True)


@pytest.mark.parametrize(("table", "config"), TABLES, ids=["engine", "sampling", "server"])
def test_table_and_fields_are_the_same(table: tuple[Flag, ...], config: type[Config]) -> None:
    paths = {flag.path.split(".")[0] for flag in table}
    assert paths == set(config.model_fields)
    assert {flag.path for flag in table if "." in flag.path} <= {"batching.kind", "batching.batch_size", "batching.max_wait_s"}


@pytest.mark.parametrize(
    ("flag", "config"), [(flag, config) for table, config in TABLES for flag in table], ids=lambda value: getattr(value, "path", "")
)
def test_default_and_choices_are_those_of_the_field(flag: Flag, config: type[Config]) -> None:
    annotation, default = field(config, flag.path)
    if isinstance(flag.default, Words):
        assert default is None
    else:
        assert flag.default == default
        assert type(flag.default) is type(default)
    if get_origin(annotation) is Literal and all(isinstance(choice, str) for choice in get_args(annotation)):
        assert flag.choices == get_args(annotation)


@pytest.mark.parametrize(
    ("flag", "config"), [(flag, config) for table, config in TABLES for flag in table], ids=lambda value: getattr(value, "path", "")
)
def test_a_flag_alone_sets_its_field_alone(flag: Flag, config: type[Config]) -> None:
    typed, value = TYPED[flag.path]
    spelled = flag.option if typed is not None else flag.option if value else flag.option.replace("--", "--no-", 1)
    argv = [spelled] if typed is None else [f"{spelled}={typed}"]
    got = flags.given(parse(*argv), (*flags.ENGINE, *flags.SAMPLING, *flags.SERVER))
    *outer, last = flag.path.split(".")
    for key in outer:
        nested = got.pop(key)
        assert not got
        assert isinstance(nested, dict)
        got = nested
    assert list(got) == [last]
    found = tuple(got[last]) if isinstance(got[last], list) else got[last]  # type: ignore[call-overload]
    assert found == value
    if not outer:
        assert getattr(config.parse({**got, **ALONG.get(flag.path, {})}), last) == value


def test_all_flags_together_make_a_configuration() -> None:
    argv = [f"{flag.option}={TYPED[flag.path][0]}" for flag in flags.ENGINE if TYPED[flag.path][0] is not None]
    config = model.engine_config(parse(*argv, "--no-prefix-cache"))
    assert config.batching == DynamicBatching(batch_size=4, max_wait_s=0.5)
    assert not config.prefix_cache
    assert config.kv_bytes == 2 * 2**30


def test_nothing_given_is_the_default_configuration() -> None:
    args = parse()
    assert model.engine_config(args) == EngineConfig()
    assert flags.given(args, flags.SAMPLING) == {}


def test_options_of_batching_without_their_policy_are_refused() -> None:
    with pytest.raises(ConfigError, match="--batching static or dynamic"):
        model.engine_config(parse("--batch-size", "4"))
    with pytest.raises(ConfigError, match="--batching dynamic"):
        model.engine_config(parse("--batching", "static", "--batch-wait-s", "1"))
    assert model.engine_config(parse("--batching", "static", "--batch-size", "4")).batching == StaticBatching(batch_size=4)


def test_stop_may_be_repeated() -> None:
    args = parse("--stop", "a", "--stop", "b")
    assert SamplingParams.parse(flags.given(args, flags.SAMPLING)).stop == ("a", "b")


@pytest.mark.parametrize(("text", "num_bytes"), [("0", 0), ("4096", 4096), ("1.5KiB", 1536), ("512MB", 512_000_000), ("2gib", 2**31)])
def test_sizes(text: str, num_bytes: int) -> None:
    assert flags.size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1", "1 2", "2GiBB", "..", "1e3"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="512MB"):
        flags.size(text)


@pytest.mark.parametrize("parse_text", [flags.token_ids, flags.biases])
@pytest.mark.parametrize("text", ["", "x", "1,", "1=2=3", "1=x"])
def test_bad_lists_are_refused(parse_text: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write"):
        parse_text(text)  # type: ignore[operator]


def test_chat_leaves_out_what_it_cannot_show() -> None:
    left_out = {flag.path for flag in flags.SAMPLING} - {flag.path for flag in CHAT_SAMPLING}
    assert left_out == {"n", "beam_width", "length_penalty", "logprobs"}


def test_default_model_is_the_stores() -> None:
    assert model.DEFAULT == store.DEFAULT


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name, table in (("engine", flags.ENGINE), ("sampling", flags.SAMPLING), ("server", flags.SERVER)):
        flags.add(parser, name, table)
    return parser.parse_args(argv)
