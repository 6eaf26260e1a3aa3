"""`gemel data sft`: fine-tuning data of any shape to conversations, and a look at what of them is trained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.data.conversation.quality import Gain

HELP = "read messy fine-tuning data into one form of conversation, choose among it, preview what is trained"
EXAMPLE = (
    'echo \'{"指令": "你好？", "输出": "你好！"}\' > rows.jsonl\n'
    "gemel data sft rows.jsonl --out sft\n"
    "gemel data sft rows.jsonl --out sft2 --preview 1 --tokenizer ~/.cache/gemel/models/smollm2-135m-instruct"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILES", help=".json and .jsonl files (.gz .zst ...), folders of them, or patterns")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder for conversations.jsonl, dropped.jsonl, report.json"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML with [[dataset]] tables (names of columns) and [[step]] tables")
    parser.add_argument("--preview", type=int, default=0, metavar="N", help="show N conversations as they are trained (needs --tokenizer)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory with a tokenizer and a chat template")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read, write, print the account."""
    from gemel.config.data import conversation as config
    from gemel.config.errors import ConfigError
    from gemel.data.conversation import sft

    if bool(args.preview) != bool(args.tokenizer):
        raise ConfigError("--preview N and --tokenizer DIR go together: the first says how many, the second how they are rendered")
    recipe = config.load(args.recipe) if args.recipe else config.SftRecipe()
    report = sft.run(args.files, recipe, args.out, _judge)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(_table(report))
        print(f"{report['kept']} conversations are in {args.out / sft.OUTPUTS[0]}, what was dropped in {args.out / sft.OUTPUTS[1]}")
    if args.preview:
        _preview(args.out / sft.OUTPUTS[0], args.tokenizer, args.preview)
    return 0


def _judge(model: str) -> Gain:
    from gemel.llm import gain, store

    return gain.Gain(store.resolve(model))


def _table(report: dict[str, Any]) -> str:
    """A line per file, and below it what was mended and lost; then a line per step."""
    from gemel.bench.report import aligned

    rows: list[tuple[str, ...]] = [("file", "rows", "with conversations", "lost", "conversations")]
    notes = []
    for path, tally in report["files"].items():
        name, lost = Path(path).name, sum(tally["lost"].values())
        rows.append((name, *(f"{n:,}" for n in (tally["rows"], tally["rows_with_conversations"], lost, tally["conversations"]))))
        notes += [f"  {name}: {reason} {count:,}" for kind in ("lost", "repaired") for reason, count in tally[kind].items()]
    lines = [aligned(rows), *notes]
    if report["steps"]:
        steps: list[tuple[str, ...]] = [("step", "before", "dropped", "added", "after")]
        steps += [
            (s["kind"], *(f"{n:,}" for n in (s["before"], sum(s["dropped"].values()), s["added"], s["after"]))) for s in report["steps"]
        ]
        lines += ["", aligned(steps)]
    intents = list(report["diversity"]["intents"].items())[:8]
    distinct = ", ".join(f"{n}: {share:.2f}" for n, share in report["diversity"]["instruction_distinct_n"].items())
    return "\n".join(
        [*lines, "", f"distinct n-grams of instructions {distinct}; asked for: {', '.join(f'{what} {n:,}' for what, n in intents)}"]
    )


def _preview(file: Path, tokenizer_path: Path, count: int) -> None:
    from gemel.data.conversation.preview import preview
    from gemel.tokenizer.conversation import Conversation
    from gemel.tokenizer.mask import encode_turns
    from gemel.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_path)
    with file.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            conversation = Conversation.from_json(json.loads(line))
            sides = [conversation.ending(answer) for answer in (conversation.chosen, conversation.rejected) if answer] or [conversation]
            for side in sides:
                for encoded in encode_turns(tokenizer, side):
                    print(f"\n== {conversation.id} ({conversation.source})")
                    print(preview(tokenizer, encoded, color=sys.stdout.isatty()))
