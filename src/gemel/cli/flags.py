"""The one table from which command-line flags of configuration fields are made.

Help must be there at once and pydantic takes half a second to import, so the flags cannot be read off the configuration types while the
command runs. They are written here once instead, and a test compares every row with its field: name, default, and that none is missing.

A flag that is not given leaves no trace in the parsed arguments, so what reaches the configuration is exactly what the user set, and
defaults stay where they are defined.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag for one configuration field.

    path     the field; a dot leads into a nested configuration
    parse    from the text on the command line; `bool` makes --name and --no-name
    default  what help says when nothing is given: the field's default, or in words what None stands for
    repeat   the flag may be given several times, each adds one value
    """

    path: str
    parse: Callable[[str], object]
    default: object
    help: str
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    name: str | None = None
    repeat: bool = False

    @property
    def option(self) -> str:
        """The long option."""
        return "--" + (self.name or self.path).replace("_", "-")


@dataclass(frozen=True, slots=True)
class Words:
    """In place of a default that is None: what None means."""

    text: str


def size(text: str) -> int:
    """Bytes from `4096`, `512MB` or `2GiB`."""
    number = text.rstrip("KMGiBkmgb")
    unit = text[len(number) :].upper()
    if not number.strip().replace(".", "", 1).isdigit() or unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes; write 4096, 512MB or 2GiB")
    return int(float(number) * UNITS[unit])


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids from `2,17`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids; write 2,17") from None


def names(text: str) -> tuple[str, ...]:
    """Names from `a.example,b.example`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def biases(text: str) -> dict[int, float]:
    """Token ids and biases from `198=-100,2=1.5`."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token id = bias; write 198=-100,2=1.5") from None


ENGINE = (
    Flag(
        "dtype",
        str,
        "auto",
        "compute type; auto: bf16 where the CPU kernels run or the hardware multiplies it, else fp32",
        ("auto", "float32", "bfloat16", "float16"),
    ),
    Flag("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Flag("threads", int, Words("the cores this process may use"), "threads of one operation", metavar="N"),
    Flag("weights", str, "auto", "auto keeps them as stored; int8 and int4 round on loading", ("auto", "int8", "int4")),
    Flag("weight_group", int, Words("32"), "elements that share a scale in int4: 32, 64 or 128", metavar="N"),
    Flag("activations", str, "int8", "of products with low-bit weights: rounded to int8, or left as they are", ("int8", "full")),
    Flag("kv", str, "auto", "type of keys and values; auto takes the compute type", ("auto", "float32", "bfloat16", "int8")),
    Flag("kernels", str, "auto", "native runs whole steps in compiled code, torch does not", ("auto", "native", "torch")),
    Flag("max_context", int, Words("the model's limit"), "tokens of prompt and output together", metavar="TOKENS"),
    Flag("max_running", int, 64, "sequences that compute at once", metavar="N"),
    Flag("max_waiting", int, 1024, "requests that may queue; one more is refused", metavar="N"),
    Flag("max_step_tokens", int, 1024, "token budget of one step, prompts and outputs together", metavar="TOKENS"),
    Flag("block_tokens", int, 16, "tokens in one key/value block: 8, 16, 32, 64 or 128", metavar="TOKENS"),
    Flag("kv_bytes", size, Words("from free memory"), "memory for keys and values, as 512MB or 2GiB", metavar="BYTES"),
    Flag("prefix_cache", bool, True, "reuse keys and values of equal prompt beginnings"),
    Flag("cache_salt", str, "", "engines with different salts share no cached prompts", metavar="TEXT"),
    Flag("batching.kind", str, "continuous", "when requests join a batch", ("continuous", "static", "dynamic"), name="batching"),
    Flag("batching.batch_size", int, 16, "size of a static or dynamic batch", metavar="N", name="batch_size"),
    Flag("batching.max_wait_s", float, 0.05, "longest wait for a dynamic batch to fill", metavar="SECONDS", name="batch_wait_s"),
)

SAMPLING = (
    Flag("max_tokens", int, Words("to the end of the context"), "at most so many output tokens", metavar="N"),
    Flag("temperature", float, 1.0, "0 always takes the likeliest token", metavar="X"),
    Flag("top_k", int, 0, "keep the K likeliest tokens; 0 keeps all", metavar="K"),
    Flag("top_p", float, 1.0, "keep the smallest set of likeliest tokens with this probability", metavar="P"),
    Flag("min_p", float, 0.0, "keep tokens at least this many times as likely as the likeliest", metavar="P"),
    Flag("repetition_penalty", float, 1.0, "above 1 makes tokens seen in prompt or output less likely", metavar="X"),
    Flag("presence_penalty", float, 0.0, "subtracted from the logit of every token in the output", metavar="X"),
    Flag("frequency_penalty", float, 0.0, "the same, once per occurrence", metavar="X"),
    Flag("logit_bias", biases, {}, "added to single tokens' logits", metavar="ID=BIAS,..."),
    Flag("seed", int, Words("drawn anew"), "same seed, same text", metavar="N"),
    Flag("stop", str, (), "a string that ends the text; may be repeated", metavar="TEXT", repeat=True),
    Flag("stop_token_ids", token_ids, (), "tokens that end the output", metavar="ID,..."),
    Flag("ignore_eos", bool, False, "go on after the model's own end token"),
    Flag("min_tokens", int, 0, "no end before so many output tokens", metavar="N"),
    Flag("logprobs", int, Words("none"), "log-probabilities of the chosen and the K likeliest tokens", metavar="K"),
    Flag("n", int, 1, "so many independent outputs", metavar="N"),
    Flag("beam_width", int, Words("sample instead"), "beam search with so many beams", metavar="K"),
    Flag("length_penalty", float, 1.0, "beam score is log-probability / length ** this", metavar="X"),
)

SERVER = (
    Flag("host", str, "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in", metavar="ADDRESS"),
    Flag("port", int, 8000, "port to listen on; 0 takes a free one", metavar="N"),
    Flag("api_key", str, Words("GEMEL_API_KEY, else none"), "key that guards everything but /health", metavar="KEY"),
    Flag("allowed_hosts", names, (), "further names under which browsers may reach the server", metavar="NAME,..."),
    Flag("max_body_bytes", size, 2_000_000, "largest request body and WebSocket message", metavar="BYTES"),
    Flag("max_head_bytes", size, 65_536, "largest request line and headers together", metavar="BYTES"),
    Flag("max_outputs", int, 128, "prompts of one call times its n", metavar="N"),
    Flag("read_timeout_s", float, 30.0, "a client has this long to send its request", metavar="SECONDS"),
    Flag("keep_alive_s", float, 15.0, "a stream that is silent for this long sends a comment", metavar="SECONDS"),
    Flag("drain_s", float, 30.0, "running requests have this long to finish after the first signal", metavar="SECONDS"),
)


def add(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    """Add a group of flags to a parser."""
    group = parser.add_argument_group(title)
    for flag in flags:
        shown = flag.default.text if isinstance(flag.default, Words) else flag.default
        text = flag.help + ("" if shown in ("", (), {}) else f" (default: {'on' if shown is True else 'off' if shown is False else shown})")
        if flag.parse is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag.option, dest=flag.path, action=action, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                flag.option,
                dest=flag.path,
                action="append" if flag.repeat else "store",
                type=flag.parse,
                choices=flag.choices or None,
                metavar=flag.metavar,
                default=argparse.SUPPRESS,
                help=text,
            )


def given(args: argparse.Namespace, flags: Sequence[Flag]) -> dict[str, object]:
    """The values that were set on the command line, nested as the configuration is."""
    values: dict[str, object] = {}
    for flag in flags:
        if hasattr(args, flag.path):
            *outer, last = flag.path.split(".")
            inner = values
            for key in outer:
                inner = inner.setdefault(key, {})  # type: ignore[assignment]
            inner[last] = getattr(args, flag.path)
    return values
