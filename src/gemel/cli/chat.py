"""`gemel chat`: talk to a model in the terminal.

The answer is drawn as it comes. Ctrl-C ends the answer and keeps what was said; a second one, or one at the prompt, ends the program.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gemel.cli import flags, model

if TYPE_CHECKING:
    import asyncio

    from gemel.config.sampling import SamplingParams
    from gemel.llm.online import AsyncLLM

HELP = "talk to a model in the terminal"
EXAMPLE = "gemel chat --temperature 0.7 --system 'Answer in one sentence.'"
COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

# One person reads one answer: no parallel outputs, no beams, no numbers in between.
SAMPLING = tuple(flag for flag in flags.SAMPLING if flag.path not in ("n", "beam_width", "length_penalty", "logprobs"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    model.add_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    flags.add(parser, "sampling", SAMPLING)
    flags.add(parser, "engine", flags.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Load and talk until the input ends."""
    from gemel.config.sampling import SamplingParams

    params = SamplingParams.parse(flags.given(args, SAMPLING))
    engine, path = model.engine_config(args), model.find(args)
    print(f"loading {path}", file=sys.stderr, flush=True)
    from gemel.llm.online import AsyncLLM

    llm = AsyncLLM.load(path, engine)
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing in input()

        print(f"{model.short_name(args)}: {COMMANDS}", file=sys.stderr)
    import asyncio

    with asyncio.Runner() as runner:
        runner.run(llm.start())
        try:
            return Conversation(llm, params, args.system).talk(runner)
        finally:
            runner.run(llm.close())


class Conversation:
    """What was said so far, and the loop that goes on with it."""

    def __init__(self, llm: AsyncLLM, params: SamplingParams, system: str | None):
        self.llm = llm
        self.params = params
        self.beginning = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.beginning)
        self.num_answers = 0

    def talk(self, runner: asyncio.Runner) -> int:
        """Read, answer, repeat; ends with the input."""
        from gemel.config.errors import GemelError

        while (line := self._read()) is not None:
            match line:
                case "":
                    continue
                case "/exit":
                    return 0
                case "/reset":
                    self.messages = list(self.beginning)
                    print("the conversation is forgotten", file=sys.stderr)
                    continue
                case _ if line.startswith("/") and " " not in line:
                    print(f"there is no command {line}; {COMMANDS}", file=sys.stderr)
                    continue
            self.messages.append({"role": "user", "content": line})
            said: list[str] = []
            try:
                runner.run(self._answer(said))
            except KeyboardInterrupt:
                print(" [stopped]", flush=True)
            except GemelError as error:
                self.messages.pop()
                print(f"gemel: {error}; /reset starts over", file=sys.stderr)
                continue
            self.messages.append({"role": "assistant", "content": "".join(said)})
        return 0

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None

    async def _answer(self, said: list[str]) -> None:
        """Stream one answer to stdout; `said` collects it, also when it is interrupted."""
        from gemel.config.errors import RequestError

        self.num_answers += 1
        prompt = self.llm.tokenizer.render_chat(self.messages)
        async for delta in self.llm.generate(prompt, self.params, request_id=f"chat-{self.num_answers}"):
            said.append(delta.text)
            print(delta.text, end="", flush=True)
            if delta.error:
                raise RequestError(delta.error)
        print(flush=True)
