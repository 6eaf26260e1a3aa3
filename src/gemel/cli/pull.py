"""`gemel pull`: fetch the embedded model, or check and repair the one that is there."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "fetch the small model that comes with Gemel"
EXAMPLE = "gemel pull"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which model (default: smollm2-135m-instruct, the only one so far)")
    parser.add_argument("--force", action="store_true", help="fetch and convert again even if the cache is whole")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Pull and print where the model is."""
    from gemel.llm import store

    name = args.name or store.DEFAULT
    home = store.fetch(name, force=args.force, say=lambda line: print(f"gemel: {line}", file=sys.stderr, flush=True))
    num_bytes = sum(path.stat().st_size for path in home.iterdir())
    if args.json:
        print(json.dumps({"name": name, "path": str(home), "num_bytes": num_bytes}))
    else:
        print(f"{name} is in {home} ({num_bytes / 1e6:.0f} MB)")
    return 0
