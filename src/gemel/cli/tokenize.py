"""`gemel tokenize`: documents to token shards, which training maps into memory.

It is the short way to write `gemel data` with `output.kind = "tokens"`: the same steps, the same shards, the same going on where a run was
stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.config.data.pipeline import Recipe

HELP = "turn documents into token shards for training"
EXAMPLE = """gemel tokenize package:stdlib --tokenizer tok --out shards
gemel tokenize recipes/stdlib.toml --tokenizer tok --out shards
gemel tokenize corpus.jsonl.zst --text-field content --tokenizer tok --out shards --workers 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from gemel.cli.tokenizer import TEXTS_HELP

    parser.add_argument("texts", nargs="+", metavar="TEXTS", help=TEXTS_HELP + "; or one data recipe, whose output is replaced")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="directory with a tokenizer.json, such as a model's")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards; a run that is there goes on")
    parser.add_argument("--end", metavar="TEXT", help="special token that ends a document (default: the tokenizer's EOS)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet rows (default: text)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once (default: the usable CPUs)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Tokenize what is not tokenized yet."""
    from gemel.config.errors import ConfigError
    from gemel.data.run import start
    from gemel.data.run.board import Board
    from gemel.data.run.local import TaskFailed
    from gemel.data.shards import TokenShards

    recipe = read(args)
    try:
        stats = start.run(recipe, Board(quiet=args.quiet))
    except TaskFailed as error:
        print(f"gemel: {error}\ngemel: the same command goes on from here", file=sys.stderr)
        return 1
    if stats is not None and not stats.kept.documents:
        reasons = ", ".join(f"{group.documents} {reason}" for _, reason, group in stats.reasons()) or "there are none"
        raise ConfigError(f"no document is left to tokenize: {reasons}; mend that, remove {args.out}, and try again")
    shards = TokenShards.open(args.out)
    report = {"path": str(args.out), "documents": len(shards.lengths), "tokens": int(shards.lengths.sum())}
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{report['tokens']:,} tokens of {report['documents']:,} documents are in {args.out}; in a recipe: [[data.train]]")
        print(f'kind = "shards"\npath = "{args.out}"')
    return 0


def read(args: argparse.Namespace) -> Recipe:
    """The data recipe that the arguments stand for. Errors: `ConfigError`."""
    from gemel.cli.tokenizer import inputs
    from gemel.config.data import pipeline
    from gemel.config.errors import ConfigError

    output = pipeline.TokensOutput(
        kind="tokens", path=str(args.out), tokenizer=args.tokenizer, end_of_document=args.end or _end(args.tokenizer)
    )
    work: dict[str, Any] = {} if args.workers is None else {"workers": args.workers}
    recipes = [text for text in args.texts if text.endswith(".toml")]
    if recipes and len(args.texts) > 1:
        raise ConfigError(f"{recipes[0]} is a data recipe and says by itself what is read; leave out the other TEXTS")
    if recipes:
        recipe = pipeline.load(Path(recipes[0]))
        return recipe.model_copy(update={"output": output, "run": pipeline.LocalRun.parse(work) if work else recipe.run})
    found = tuple(inputs(args.texts, args.text_field))
    return pipeline.Recipe(input=found, output=output, run=pipeline.LocalRun.parse(work))


def _end(path: Path) -> str:
    from gemel.config.errors import ConfigError
    from gemel.tokenizer.tokenizer import Tokenizer

    end = Tokenizer.load(path).named.get("eos_token")
    if end is None:
        raise ConfigError(f"the tokenizer in {path} names no EOS to end documents with; name one of its special tokens with --end")
    return end
