"""`gemel generate`: complete prompts offline, one from the command line or many from a file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemel.cli import flags, model

if TYPE_CHECKING:
    from gemel.config.sampling import SamplingParams
    from gemel.llm.offline import Completion

HELP = "complete a prompt, or a file of prompts"
EXAMPLE = (
    "gemel generate 'The capital of France is' --max-tokens 20 --temperature 0\n"
    'echo \'{"prompt": "Once upon a time", "max_tokens": 20}\' | gemel generate --prompts - --json'
)


@dataclass(frozen=True, slots=True)
class Job:
    """One line of a prompts file: a prompt (text or token ids) or a conversation, and how to continue it."""

    prompt: str | list[int] | None
    messages: list[dict[str, object]] | None
    params: SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    model.add_arguments(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; without it and without --prompts, standard input")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines, each with "prompt" (text or token ids) or "messages", and sampling of its own; - is standard input',
    )
    parser.add_argument("--chat", action="store_true", help="PROMPT is what a user says: render it with the model's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    flags.add(parser, "sampling", flags.SAMPLING)
    flags.add(parser, "engine", flags.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Read all prompts, generate them together, print in their order."""
    from gemel.config.sampling import SamplingParams

    given = flags.given(args, flags.SAMPLING)
    SamplingParams.parse(given)  # a mistake should not wait for the model
    jobs = read_jobs(args, given)
    engine, path = model.engine_config(args), model.find(args)
    from gemel.llm.offline import LLM

    llm = LLM(path, engine)
    prompts = [llm.tokenizer.render_chat(job.messages) if job.prompt is None else job.prompt for job in jobs]  # type: ignore[arg-type]
    done = llm.generate(prompts, [job.params for job in jobs], progress=len(jobs) > 1)
    for completion in done:
        if args.json:
            print(json.dumps(completion.as_json(), ensure_ascii=False))
        else:
            print_outputs(completion, headed=len(jobs) > 1 or len(completion.outputs) > 1)
    return report_errors(done)


def print_outputs(completion: Completion, headed: bool) -> None:
    """The texts of one prompt's outputs; with several texts on the screen, each under a line that says whose it is."""
    for number, output in enumerate(completion.outputs, 1):
        if headed:
            print(f"--- prompt {completion.index + 1}, output {number}")
        print(output.text)


def report_errors(done: list[Completion]) -> int:
    """Name on stderr what was refused or failed; 2 if anything was."""
    failed = {completion.index: output.error for completion in done for output in completion.outputs if output.error}
    for index, error in failed.items():
        print(f"gemel: prompt {index + 1}: {error}" if len(done) > 1 else f"gemel: {error}", file=sys.stderr)
    return 2 if failed else 0


def read_jobs(args: argparse.Namespace, given: dict[str, object]) -> list[Job]:
    """What is to be generated, from the arguments, a file, or standard input."""
    from gemel.config.errors import ConfigError
    from gemel.config.sampling import SamplingParams

    if args.prompts is not None:
        if args.prompt is not None or args.chat:
            raise ConfigError('give PROMPT (and --chat), or --prompts FILE, not both; a line of the file with "messages" is a chat')
        return _read_file(args.prompts, given)
    text = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    if not text:
        raise ConfigError("the prompt is empty: give it as an argument or on standard input")
    params = SamplingParams.parse(given)
    return [Job(None, [{"role": "user", "content": text}], params) if args.chat else Job(text, None, params)]


def _read_file(name: str, given: dict[str, object]) -> list[Job]:
    from gemel.config.errors import ConfigError

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {name}: {error}; it has to be a file of JSON lines in UTF-8") from None
    jobs = [_read_line(line, f"{name} line {number}", given) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not jobs:
        raise ConfigError(f'{name} holds no prompts; write one JSON object per line, like {{"prompt": "Hello"}}')
    return jobs


def _read_line(line: str, where: str, given: dict[str, object]) -> Job:
    from gemel.config.errors import ConfigError
    from gemel.config.sampling import SamplingParams

    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or len(values.keys() & {"prompt", "messages"}) != 1:
        raise ConfigError(f'{where} has to be an object with either "prompt" or "messages"')
    prompt, messages = values.pop("prompt", None), values.pop("messages", None)
    text_or_ids = isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt))
    if messages is None and not (text_or_ids and prompt):
        raise ConfigError(f'{where}: "prompt" has to be text or a list of token ids, and not empty')
    if prompt is None and not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise ConfigError(f'{where}: "messages" has to be a list of objects with "role" and "content"')
    try:
        return Job(prompt, messages, SamplingParams.parse(given | values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
