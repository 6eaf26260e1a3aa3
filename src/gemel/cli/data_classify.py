"""`gemel data classify`: train the small classifier of texts from labelled ones, and say how good it is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

HELP = "train a small quality classifier from labelled texts; prints precision and recall on held-out ones"
EXAMPLE = """gemel data classify labels.jsonl --output quality.safetensors
gemel data classify labels.jsonl --output quality.safetensors --good-from 4 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL with texts and labels, as `gemel data label` writes it")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the model, a .safetensors file for a step of kind classify"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--label-field", default="score", metavar="NAME", help="true, false or a number (default: %(default)s)")
    parser.add_argument("--good-from", type=float, default=3.0, metavar="X", help="numbers from here on are good (default: %(default)s)")
    parser.add_argument("--held-out", type=float, default=0.2, metavar="X", help="share of the texts to judge by (default: %(default)s)")
    parser.add_argument("--l2", type=float, default=0.1, metavar="X", help="strength of regularisation (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, save, report."""
    from gemel.data.label import read_labelled
    from gemel.data.steps.classify import train

    labelled = list(read_labelled(args.files, args.good_from, args.label_field, args.text_field))
    classifier = train(labelled, l2=args.l2, held_out=args.held_out)
    classifier.save(args.output)
    if args.json:
        print(
            json.dumps(
                {"texts": len(labelled), "good": sum(one.good for one in labelled), "report": [asdict(r) for r in classifier.report]}
            )
        )
        return 0
    print(f"{len(labelled)} texts, {sum(one.good for one in labelled)} good; figures of the {classifier.report[0].num_texts} held out")
    print("min_score  precision  recall  accuracy")
    for row in classifier.report:
        print(f"{row.threshold:9.2f}  {row.precision:9.3f}  {row.recall:6.3f}  {row.accuracy:8.3f}")
    print(f"wrote {args.output}")
    return 0
