"""`gemel data label`: have a large language model say how good texts are, to train a small classifier from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.config.data.rules import LabelConfig
    from gemel.data.label import Answer, Ask

HELP = "have a large language model label texts, through an endpoint or in this process"
EXAMPLE = """gemel data label sample.jsonl --output labels.jsonl --model smollm2-135m-instruct
gemel data label sample.jsonl --output labels.jsonl --engine smollm2-135m-instruct
gemel data label sample.jsonl --output labels.jsonl --endpoint https://api.openai.com/v1 --model MODEL --api-key-file key.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL, or plain text with one document a file; .gz works")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL of labels; a run that is there goes on")
    parser.add_argument("--field", default="text", help="of the text in JSONL (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible API (default: http://127.0.0.1:8000/v1, `gemel serve`)")
    parser.add_argument("--model", metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the endpoint's key")
    parser.add_argument("--engine", metavar="MODEL", help="no endpoint: load this model here (directory, .gguf file, or name)")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="what to ask instead; {text} stands for the text, {most} for the top")
    parser.add_argument("--most", type=int, metavar="N", help="highest score (default: 5)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: 200)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: 8)")


def run(args: argparse.Namespace) -> int:
    """Label what is not labelled yet; 1 if some texts got no label."""
    from itertools import islice

    from gemel.config.data.rules import LabelConfig
    from gemel.config.errors import ConfigError
    from gemel.data import label

    if args.engine and (args.endpoint or args.model or args.api_key_file or args.concurrency):
        raise ConfigError(
            "--engine loads a model here; --endpoint, --model, --api-key-file and --concurrency belong to a server: leave them out"
        )
    values = {
        name: getattr(args, name) for name in ("endpoint", "model", "most", "max_tokens", "concurrency") if getattr(args, name) is not None
    }
    try:
        prompt = {"prompt": args.prompt.read_text("utf-8")} if args.prompt else {}
        key = args.api_key_file.read_text("utf-8").strip() if args.api_key_file else ""
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    config = LabelConfig.parse(values | prompt)
    ask = _engine(args.engine, config) if args.engine else label.Endpoint(config, key)
    counts = label.write(islice(label.read_texts(args.files, args.field), args.limit), ask, config, args.output)
    for name, number in sorted(counts.items()):
        print(f"{number:8d}  {name}")
    return int(bool(counts.get("label.failed", 0) or counts.get("label.unreadable", 0)))


def _engine(model: str, config: LabelConfig) -> Ask:
    """A model of our own, asked in batches."""
    from gemel.config.sampling import SamplingParams
    from gemel.data.label import Answer
    from gemel.llm import store
    from gemel.llm.offline import LLM

    llm = LLM(store.resolve(model))
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens)

    def ask(prompts: Sequence[str]) -> list[Answer]:
        done = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params, progress=False)
        return [Answer(one.text, one.outputs[0].error or "") for one in done]

    return ask
