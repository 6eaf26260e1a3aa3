"""`gemel VERB ...`: finds the verb, imports only that one, and turns what goes wrong into one line and a status.

A verb is a module of this room with `HELP`, `EXAMPLE`, `add_arguments` and `run`, and perhaps `VERBS` below it: `gemel data inspect` is the
module `data_inspect`. Neither this module nor the top of a verb's module imports torch or pydantic, because help must be there at once; a
verb imports what it needs inside `run`.

Exit status: 0 done, 1 the answer is no (doctor found something missing), 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from gemel import __version__

VERBS = ("pull", "serve", "chat", "generate", "data", "tokenizer", "tokenize", "train", "launch", "runs", "bench", "doctor")

# torch's OpenMP threads spin for a long time at every barrier before they sleep. On a machine that somebody else uses too, the thread that
# is waited for does not get its core while the other spins, and a step takes ten times as long. So many loops are some microseconds. The
# variable is read when torch is loaded; whoever has set it keeps it.
SPIN_COUNT = "10000"


class Verb(Protocol):
    """What a module of this room offers. `HELP` is one line, `EXAMPLE` one or more commands that work as they stand."""

    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments; must stay cheap, since help calls it."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit status."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a mistake costs one line, names the nearest option, and prefixes of options do not count as options."""

    def __init__(self, prog: str, description: str, epilog: str):
        super().__init__(
            prog=prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's, with a proposal for an option that does not exist."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._options(), n=1)
            self.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return known

    def _options(self) -> list[str]:
        """Those of the verb and of all its actions."""
        found = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for parser in action.choices.values() for option in parser._options()]
        return found

    def error(self, message: str) -> NoReturn:
        """One line and the place to look."""
        self.exit(2, f"gemel: {message} (see {self.prog} --help)\n")


def verb(name: str) -> Verb:
    """The verb's module, imported now. A verb below another is named with it, as in `data inspect`."""
    return cast(Verb, import_module(f"gemel.cli.{name.replace(' ', '_')}"))


def below(name: str) -> tuple[str, ...]:
    """The verbs below a verb."""
    return getattr(verb(name), "VERBS", ())


def parser(name: str) -> Parser:
    """The verb's argument parser."""
    module = verb(name)
    lines = [f"  gemel {name} {other:<9} {verb(f'{name} {other}').HELP}" for other in below(name)]
    verbs = "\n".join(["verbs:", *lines, "", ""]) if lines else ""
    made = Parser(f"gemel {name}", module.HELP, verbs + "example:\n" + "\n".join(f"  {line}" for line in module.EXAMPLE.splitlines()))
    module.add_arguments(made)
    return made


def overview() -> str:
    """What `gemel --help` prints."""
    lines = [f"  {name:<9} {verb(name).HELP}" for name in VERBS]
    return "\n".join(
        [
            "usage: gemel VERB [options]     gemel VERB --help     gemel --version",
            "",
            *lines,
            "",
            "example:",
            "  gemel pull && gemel serve",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the entry point of the `gemel` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        return _dispatch(argv)
    except BrokenPipeError:
        # The reader went away (`gemel ... | head`). Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        from gemel.config.errors import GemelError

        if not isinstance(error, GemelError):
            raise
        print(f"gemel: {error}", file=sys.stderr)
        return 2


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"gemel {__version__}")
        return 0
    name = argv[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"gemel: there is no verb {name!r}; {hint}", file=sys.stderr)
        return 2
    rest = argv[1:]
    if rest and rest[0] in below(name):
        name, rest = f"{name} {rest[0]}", rest[1:]
    status = verb(name).run(parser(name).parse_args(rest))
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
