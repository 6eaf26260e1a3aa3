"""`gemel tokenizer train | encode | fertility | extend`: make a tokenizer, use it, judge it, add to it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel.tokenizer.tokenizer import Tokenizer

HELP = "train a tokenizer, encode with it, report its fertility, or extend it and its model"
EXAMPLE = (
    "gemel tokenizer train package:stdlib --vocab-size 4096 --out tok\n"
    "gemel tokenizer fertility --tokenizer tok en=package:json\n"
    "gemel tokenizer encode --tokenizer tok --text 'Hello, world'"
)

TEXTS_HELP = "text files, folders of them, .jsonl (.gz .zst ...) or .parquet files, or package:NAME for the sources of a Python package"
PACKAGE = "package:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the four actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_train(_action(actions, "train", "learn a byte-level BPE vocabulary", "gemel tokenizer train package:stdlib --out tok"))
    _add_encode(_action(actions, "encode", "token ids of texts", "gemel tokenizer encode --tokenizer tok --text 'Hello, world'"))
    _add_fertility(
        _action(
            actions,
            "fertility",
            "how much a token says, language by language",
            "gemel tokenizer fertility --tokenizer tok en=a.txt zh=b.txt",
        )
    )
    _add_extend(
        _action(
            actions,
            "extend",
            "add tokens to a tokenizer, and rows to its model",
            "gemel tokenizer extend --from tok --learn 100 package:asyncio --out tok2",
        )
    )


def run(args: argparse.Namespace) -> int:
    """Do the chosen action."""
    report = {"train": _train, "encode": _encode, "fertility": _fertility, "extend": _extend}[args.action](args)
    if args.json and report is not None:
        print(json.dumps(report, ensure_ascii=False))
    return 0


def _action(actions: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(
        name, prog=f"gemel tokenizer {name}", description=text, help=text, epilog=f"example:\n  {example}"
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXTS", help=TEXTS_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where tokenizer.json and tokenizer_config.json go")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens in all (default: 32768)")
    parser.add_argument("--pattern", metavar="REGEX", help="what a token never reaches beyond (default: Llama 3's)")
    parser.add_argument("--special", action="append", metavar="TEXT", help="a special token; may be repeated (default: those of ChatML)")
    parser.add_argument("--eos", metavar="TEXT", help="which special token ends a text (default: <|endoftext|>)")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template to save with it")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet rows (default: text)")


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="directory with a tokenizer.json, or a .gguf file")
    parser.add_argument("--text", metavar="TEXT", help="encode this; without it, standard input")
    parser.add_argument("--library", choices=("auto", "fastokens", "tokenizers"), default="auto", help="what encodes (default: auto)")


def _add_fertility(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="[NAME=]TEXTS", help=TEXTS_HELP + "; NAME heads their line")
    parser.add_argument("--tokenizer", required=True, action="append", type=Path, metavar="DIR", help="may be repeated, to compare")
    parser.add_argument("--by", metavar="FIELD", help="a line for each value of this field of the rows, such as language")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet rows (default: text)")


def _add_extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXTS", help="what to learn from: " + TEXTS_HELP)
    parser.add_argument("--from", dest="old", required=True, type=Path, metavar="DIR", help="a model's directory, or a tokenizer's")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new directory: the tokenizer, and the model if there was one"
    )
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="one token per line; spaces in front count")
    parser.add_argument("--special", action="append", default=[], metavar="TEXT", help="a new special token; may be repeated")
    parser.add_argument("--learn", type=int, default=0, metavar="N", help="learn so many tokens from TEXTS (default: 0)")
    parser.add_argument("--min-count", type=int, metavar="N", help="a learnt token must occur so often (default: 10)")
    parser.add_argument("--whole-words", action="store_true", help="tokens of FILE do not stand inside of words")
    parser.add_argument("--pad-to-multiple", type=int, metavar="N", help="rows of the model's embedding (default: 64)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of .jsonl and .parquet rows (default: text)")


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from gemel.config.errors import ConfigError
    from gemel.config.tokenizer import TrainConfig
    from gemel.tokenizer.train import train

    values: dict[str, Any] = {"vocab_size": args.vocab_size, "pattern": args.pattern, "special_tokens": args.special}
    if args.eos or args.special:
        values["named"] = {"eos_token": args.eos or args.special[0]}
    if args.chat_template:
        try:
            values["chat_template"] = args.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {args.chat_template}: {error}") from None
    config = TrainConfig.parse({key: value for key, value in values.items() if value is not None})
    counted = _Counted(texts(args.texts, args.text_field))
    made = train(counted, config)
    made.save(args.out)
    report = {"path": str(args.out), "vocab_size": made.vocab_size, "num_texts": counted.num_texts, "num_bytes": counted.num_bytes}
    if not args.json:
        print(f"{made.vocab_size} tokens from {counted.num_texts} texts ({counted.num_bytes / 1e6:.1f} MB) are in {args.out}")
    return report


def _encode(args: argparse.Namespace) -> dict[str, Any]:
    from gemel.tokenizer.encode import Encoder

    tokenizer = _load(args.tokenizer)
    text = sys.stdin.read() if args.text is None else args.text
    encoder = Encoder(tokenizer, [text], args.library)
    ids = encoder([text])[0].tolist()
    if not args.json:
        print(" ".join(map(str, ids)))
        print(f"gemel: {len(ids)} tokens by {encoder.library}: {encoder.reason}", file=sys.stderr)
    return {"ids": ids, "library": encoder.library, "reason": encoder.reason}


def _fertility(args: argparse.Namespace) -> dict[str, Any]:
    from gemel.bench.report import aligned
    from gemel.tokenizer.encode import Encoder
    from gemel.tokenizer.fertility import measure

    groups = _groups(args)
    report: dict[str, Any] = {}
    for path in args.tokenizer:
        tokenizer = _load(path)
        encoder = Encoder(tokenizer, [text for group in groups.values() for text in group[:100]])
        found = [measure(name, group, tokenizer, encoder) for name, group in groups.items()]
        report[str(path)] = {"vocab_size": tokenizer.vocab_size, "languages": [line.as_json() for line in found]}
        if args.json:
            continue
        rows = [("language", "texts", "tokens", "tokens/word", "characters/token", "bytes/token", "fallback")]
        rows += [
            (
                line.language,
                f"{line.num_texts:,}",
                f"{line.num_tokens:,}",
                f"{line.tokens_per_word:.2f}",
                f"{line.chars_per_token:.2f}",
                f"{line.bytes_per_token:.2f}",
                f"{line.fallback_share:.1%}",
            )
            for line in found
        ]
        print(f"{path} ({tokenizer.vocab_size:,} tokens)\n{aligned(rows)}\n")
    return report


def _groups(args: argparse.Namespace) -> dict[str, list[str]]:
    """Texts under the name that was given for them, or under a field of their row."""
    groups: dict[str, list[str]] = {}
    for argument in args.texts:
        name, equals, path = argument.partition("=")
        if not equals or "/" in name:
            name, path = Path(argument).name, argument
        for document in _documents([path], args.text_field):
            key = str(document.metadata.get(args.by, "none")) if args.by else name
            groups.setdefault(key, []).append(document.text)
    return groups


def _extend(args: argparse.Namespace) -> dict[str, Any]:
    from gemel.config.errors import ConfigError
    from gemel.config.tokenizer import ExtendConfig
    from gemel.tokenizer.extend import describe, extend

    if args.texts and not args.learn:
        raise ConfigError("TEXTS are there to learn from: give --learn N too, or leave them out")
    if args.learn and not args.texts:
        raise ConfigError(f"--learn {args.learn} needs TEXTS of the domain")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} exists and is not an empty directory; give another one")
    values: dict[str, Any] = {"special_tokens": args.special, "learn": args.learn, "whole_words": args.whole_words}
    values |= {"min_count": args.min_count, "pad_to_multiple": args.pad_to_multiple, "tokens": _lines(args.tokens) if args.tokens else None}
    config = ExtendConfig.parse({key: value for key, value in values.items() if value is not None})
    old = _load(args.old)
    extension = extend(old, config, texts(args.texts, args.text_field))
    num_rows = _resize(args.old, args.out, extension.tokenizer.vocab_size, extension.pieces, config.pad_to_multiple)
    extension.tokenizer.save(args.out)
    added = describe(old, extension)
    if not args.json:
        for token in added:
            print(f"{token['id']:>8}  {token['text']!r}  was {' '.join(map(repr, token['pieces']))}")
        print(f"{len(added)} tokens added" + (f", one already: {', '.join(map(repr, extension.known))}" if extension.known else ""))
        print(
            f"the tokenizer is in {args.out}" + (f", with its model of {num_rows} rows" if num_rows else "; there was no model to resize")
        )
    return {"path": str(args.out), "added": added, "known": list(extension.known), "model_rows": num_rows}


def _resize(old: Path, out: Path, num_tokens: int, pieces: Any, pad_to_multiple: int) -> int | None:
    """Write the resized model, if there is one, and return its rows."""
    if not (old / "config.json").is_file():
        return None
    from gemel.config.errors import UnsupportedError
    from gemel.model import build
    from gemel.model.resize import resize

    seen = build.peek(old)
    if seen.low_bit:
        raise UnsupportedError(f"{old} has matrices of few bits; extend the model that it was made from, then quantize again")
    resized = resize(build.load(old, dtype=seen.stored), num_tokens, pieces, pad_to_multiple)
    build.save(resized, out)
    return resized.config.vocab_size


def _lines(path: Path) -> list[str]:
    from gemel.config.errors import ConfigError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read tokens from {path}: {error}") from None


def _load(path: Path) -> Tokenizer:
    from gemel.tokenizer.tokenizer import Tokenizer

    return Tokenizer.load(path)


class _Counted:
    """Texts on their way, counted."""

    def __init__(self, texts: Iterator[str]):
        self._texts = texts
        self.num_texts = self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num_texts += 1
            self.num_bytes += len(text.encode())
            yield text


def texts(paths: Sequence[str], text_field: str) -> Iterator[str]:
    """The texts in files and packages. What cannot be read is named on stderr."""
    return (document.text for document in _documents(paths, text_field))


def _documents(paths: Sequence[str], text_field: str) -> Iterator[Any]:
    from gemel.data import build
    from gemel.data.document import Dropped
    from gemel.data.read.reader import Reading

    for config in inputs(paths, text_field):
        reader = build.reader(config)
        for piece in reader.pieces():
            for document in reader.read(piece, Reading()):
                if isinstance(document, Dropped):
                    print(f"gemel: left out {document.document.id}: {document.reason} ({document.detail})", file=sys.stderr)
                else:
                    yield document


def inputs(paths: Sequence[str], text_field: str) -> Iterator[Any]:
    """How paths are read, as their names tell."""
    return (_input(path, text_field) for path in paths)


def _input(path: str, text_field: str) -> Any:
    from gemel.config.data.pipeline import HtmlInput, JsonlInput, MarkdownInput, PackageInput, ParquetInput, TextInput

    if path.startswith(PACKAGE):
        return PackageInput(kind="package", names=(path.removeprefix(PACKAGE),))
    name = path.removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".xz")
    if name.endswith((".jsonl", ".ndjson")):
        return JsonlInput(kind="jsonl", paths=(path,), text_field=text_field)
    if name.endswith(".parquet"):
        return ParquetInput(kind="parquet", paths=(path,), text_field=text_field)
    if name.endswith(".md"):
        return MarkdownInput(kind="markdown", paths=(path,))
    if name.endswith((".html", ".htm")):
        return HtmlInput(kind="html", paths=(path,))
    return TextInput(kind="text", paths=(path,))
