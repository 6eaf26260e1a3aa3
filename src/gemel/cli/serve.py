"""`gemel serve`: an OpenAI-compatible server and a web page over one model."""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemel.cli import flags, model

if TYPE_CHECKING:
    from gemel.config.server import ServerConfig
    from gemel.engine.place import Derived

HELP = "serve a model over HTTP: OpenAI-compatible API, metrics, web page"
EXAMPLE = "gemel serve --port 8000\ngemel serve --model ./my-model --kv-bytes 2GiB --max-context 4096"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    model.add_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="what clients call the model (default: its name or the last part of its path)")
    flags.add(parser, "server", flags.SERVER)
    flags.add(parser, "engine", flags.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Load, say what was decided, serve until a signal ends it."""
    from gemel.config.env import env
    from gemel.config.server import ServerConfig

    values = flags.given(args, flags.SERVER)
    if env().api_key is not None:
        values.setdefault("api_key", env().api_key)
    config = ServerConfig.parse(values)
    engine = model.engine_config(args)
    path = model.find(args)
    config = config.model_copy(update={"port": free_port(config)})

    print(f"loading {path}", file=sys.stderr, flush=True)
    from gemel.llm.online import AsyncLLM
    from gemel.server.app import create_app
    from gemel.server.run import run as serve

    llm = AsyncLLM.load(path, engine)
    name = args.name or model.short_name(args)
    print(banner(name, config, llm.engine.derived), flush=True)
    serve(create_app(llm, config, name), config)
    return 0


def banner(name: str, config: ServerConfig, derived: Iterable[Derived]) -> str:
    """What was decided and why, where to look, and one request to copy."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, f"[{config.host}]" if ":" in config.host else config.host)
    url = f"http://{host}:{config.port}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_key else ""
    body = '{"messages": [{"role": "user", "content": "What is a gemel ring?"}]}'
    lines = [
        f"model     {name}",
        *(f"{each.name:<9} {each.value}: {each.reason}" for each in derived),
        f"page      {url}",
        f"api       {url}/v1",
        f"try       curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    ]
    return "\n".join(lines)


def free_port(config: ServerConfig) -> int:
    """The port to listen on, chosen now if it is 0. What cannot be listened on is an error before the model is loaded, not after."""
    from gemel.config.errors import ConfigError

    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            way_out = "--port 0 takes a free one" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "give another --host"
            raise ConfigError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; {way_out}") from None
        return int(probe.getsockname()[1])
