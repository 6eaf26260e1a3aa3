"""`gemel data ngram`: train an n-gram model from good text, for a step of kind perplexity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "train an n-gram model from good text; prints the perplexities of held-out texts, to choose thresholds by"
EXAMPLE = """gemel data ngram good.jsonl --output good.safetensors
gemel data ngram good/*.txt --output good.safetensors --order 4 --min-count 2"""
PERCENTILES = (10, 30, 50, 60, 90, 99)  # CCNet cut at 30 and 60
HELD_OUT = 50  # one text of so many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL, or plain text with one document a file; .gz works")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model, a .safetensors file")
    parser.add_argument("--field", default="text", help="of the text in JSONL (default: %(default)s)")
    parser.add_argument("--order", type=int, default=3, choices=range(1, 8), metavar="N", help="words in the longest n-gram (default: 3)")
    parser.add_argument("--unit", choices=("words", "spaces", "characters"), default="words", help="what a token is (default: %(default)s)")
    parser.add_argument("--keep-case", action="store_true", help="do not read the text in lower case")
    parser.add_argument("--min-count", type=int, default=1, metavar="N", help="leave out rarer n-grams of order 2 and more (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train, save, report."""
    from itertools import islice

    import numpy as np

    from gemel.data.label import read_texts
    from gemel.data.steps.ngram import train
    from gemel.data.steps.perplexity import perplexities

    texts = [text for _, text in read_texts(args.files, args.field)]
    held_out = texts[::HELD_OUT] if len(texts) > 1 else []
    learn = iter([text for number, text in enumerate(texts) if not held_out or number % HELD_OUT])
    model = train(iter(lambda: list(islice(learn, 256)), []), args.order, args.unit, not args.keep_case, args.min_count)
    model.save(args.output)
    sizes = [len(table.keys) for table in model.tables]
    values = perplexities(model, held_out)
    spread = {f"p{q}": round(float(np.percentile(values, q)), 1) for q in PERCENTILES} if len(values) else {}
    if args.json:
        print(json.dumps({"texts": len(texts), "held_out": len(held_out), "ngrams": sizes, "perplexity": spread}))
        return 0
    print(f"{len(texts)} texts; n-grams of each order: {', '.join(map(str, sizes))}")
    if spread:
        print(f"perplexity of the {len(held_out)} held out: " + ", ".join(f"{name} {value}" for name, value in spread.items()))
    print(f"wrote {args.output}")
    return 0
