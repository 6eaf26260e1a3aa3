"""`gemel bench`: measured and planned figures of the engine here. The work is in `gemel.bench.command`; this names it as a verb."""

from __future__ import annotations

import argparse

HELP = "measure throughput, decode, prefill and prefix caching here, beside the plan"
EXAMPLE = "gemel bench throughput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from gemel.bench import command

    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    from gemel.bench import command

    return command.run(args)
