"""`gemel bench`: measured and planned figures of the engine here. The work is in `gemel.bench.command`; this names it as a verb."""

from __future__ import annotations

import argparse

from gemel.bench import command
from gemel.cli import flags, model

HELP = "measure serving, data and training here, beside the plan and beside peers"
EXAMPLE = """gemel bench throughput
gemel bench train --shape 7m --levers"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    model.add_arguments(parser)
    command.add_arguments(parser)
    flags.add(parser, "engine", flags.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    if args.benchmark == "train":
        from gemel.config.engine import EngineConfig
        from gemel.config.errors import ConfigError

        if args.model != model.DEFAULT or args.pull or model.engine_config(args) != EngineConfig():
            raise ConfigError("--model, --pull and engine flags have no effect on train, which trains random weights; see --shape")
        return command.train(args)
    return command.run(args, model.short_name(args), model.find(args), model.engine_config(args))
