"""`gemel data inspect`: what a run kept and dropped, and why, in tables, as documents to read, and as a page with plots."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "figures and samples of what a run of `gemel data` kept and dropped"
EXAMPLE = """gemel data inspect out
gemel data inspect out --dropped length.short --samples 10
gemel data inspect out --html report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("output", type=Path, metavar="OUT", help="folder that `gemel data` wrote to")
    parser.add_argument("--dropped", metavar="REASON", help="only documents dropped for this reason, or for all that begin with it")
    parser.add_argument("--samples", type=int, metavar="N", help="documents shown for each reason (default: 2; with --dropped 10)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots and samples that needs nothing beside it")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums; status 1 if one is damaged")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look and print."""
    from gemel.data import inspect

    found = inspect.look(args.output)
    if args.verify:
        damaged = inspect.verify(found)
        print(json.dumps({"files": len(found.entries), "damaged": damaged}) if args.json else _verdict(len(found.entries), damaged))
        return int(bool(damaged))
    if args.html:
        from gemel.data import report

        args.html.write_text(report.page(found, args.samples or 3), encoding="utf-8")
        print(json.dumps({"html": str(args.html)}) if args.json else f"wrote {args.html}")
    elif args.dropped:
        named = {reason: inspect.dropped_samples(found, reason, args.samples or 10) for reason in inspect.reasons(found, args.dropped)}
        if args.json:
            print(json.dumps({reason: [sample.to_json() for sample in samples] for reason, samples in named.items()}, ensure_ascii=False))
        else:
            print("\n\n".join(inspect.show(f"dropped: {reason}", samples) for reason, samples in named.items()))
    elif args.json:
        print(json.dumps(inspect.to_json(found)))
    else:
        print(inspect.tables(found))
        num = 2 if args.samples is None else args.samples
        for title, samples in inspect.all_samples(found, num):
            print("\n" + inspect.show(title, samples))
    return 0


def _verdict(num_files: int, damaged: list[str]) -> str:
    return "\n".join(damaged) if damaged else f"all {num_files} files are what was written"
