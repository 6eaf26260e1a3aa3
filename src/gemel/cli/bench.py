"""`gemel bench`: measured and planned figures of the engine here. The work is in `gemel.bench.command`; this names it as a verb."""

from __future__ import annotations

import argparse

from gemel.bench import command
from gemel.cli import flags, model

HELP = "measure throughput, decode, prefill and prefix caching here, beside the plan"
EXAMPLE = "gemel bench throughput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    model.add_arguments(parser)
    command.add_arguments(parser)
    flags.add(parser, "engine", flags.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    return command.run(args, model.short_name(args), model.find(args), model.engine_config(args))
