"""From a recipe's tables to the objects that do the work. Each import stands in its case, so a run loads only what its recipe names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from gemel.config.data.dedup import DecontaminateConfig, ExactConfig, ExactPartsConfig, LinesConfig, MinHashConfig, MixConfig
from gemel.config.data.pipeline import (
    CustomConfig,
    HtmlInput,
    Input,
    JsonlInput,
    JsonlOutput,
    LengthConfig,
    MarkdownInput,
    Output,
    PackageInput,
    ParquetInput,
    ParquetOutput,
    StepConfig,
    TextInput,
    TokensOutput,
    WarcInput,
    WetInput,
)
from gemel.config.errors import ConfigError
from gemel.data.read.reader import Reader
from gemel.data.step import CorpusStep, Step
from gemel.data.write import Writer

CORPUS_METHODS = ("keys", "resolve", "conclude", "apply")


def reader(config: Input) -> Reader:
    """What reads an input."""
    match config:
        case JsonlInput():
            from gemel.data.read.rows import JsonlReader

            return JsonlReader(config)
        case ParquetInput():
            from gemel.data.read.rows import ParquetReader

            return ParquetReader(config)
        case TextInput():
            from gemel.data.read.text import TextReader

            return TextReader(config)
        case MarkdownInput():
            from gemel.data.read.text import MarkdownReader

            return MarkdownReader(config)
        case HtmlInput():
            from gemel.data.read.text import HtmlReader

            return HtmlReader(config)
        case WarcInput() | WetInput():
            from gemel.data.read.warc import WarcReader

            return WarcReader(config)
        case PackageInput():
            from gemel.data.read.package import PackageReader

            return PackageReader(config)


def build(config: StepConfig) -> Step | CorpusStep:
    """What does a step. Errors: `ConfigError`, for instance if a library that it needs is not installed."""
    match config:
        case LengthConfig():
            from gemel.data.steps.length import Length

            return Length(config)
        case ExactConfig():
            from gemel.data.steps.exact import Exact

            return Exact(config)
        case ExactPartsConfig():
            from gemel.data.steps.exact import ExactParts

            return ExactParts(config)
        case MinHashConfig():
            from gemel.data.steps.minhash import MinHash

            return MinHash(config)
        case LinesConfig():
            from gemel.data.steps.lines import Lines

            return Lines(config)
        case DecontaminateConfig():
            from gemel.data.steps.decontaminate import Decontaminate

            return Decontaminate(config)
        case MixConfig():
            from gemel.data.steps.mix import Mix

            return Mix(config)
        case CustomConfig():
            return custom(config)


def name(config: StepConfig) -> str:
    """How reports call a step."""
    return config.name or config.target.partition(":")[2] if isinstance(config, CustomConfig) else config.kind


def writer(config: Output, output: Path, unit: int) -> Writer:
    """What writes the kept documents of one unit of work."""
    kept = f"kept/{unit:06d}"
    match config:
        case JsonlOutput():
            from gemel.data.write import JsonlWriter

            return JsonlWriter(output, kept, config)
        case ParquetOutput():
            from gemel.data.write import ParquetWriter

            return ParquetWriter(output, kept, config)
        case TokensOutput():
            from gemel.data import pack

            return pack.TokensWriter(output, kept, *pack.load(config))


def custom(config: CustomConfig) -> Step | CorpusStep:
    """The user's own class. Only classes that look like steps are called, so a recipe cannot name any function it likes."""
    module, _, attribute = config.target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"step target {config.target!r}: {error}; the module must be importable, see PYTHONPATH") from None
    methods = {method for parent in getattr(found, "__mro__", ()) for method in vars(parent)}
    if not isinstance(found, type) or not ("__call__" in methods or methods.issuperset(CORPUS_METHODS)):
        raise ConfigError(f"step target {config.target!r} is not a class with __call__, or with {', '.join(CORPUS_METHODS)}")
    try:
        made: Step | CorpusStep = found(**config.arguments)
    except TypeError as error:
        raise ConfigError(f"step target {config.target!r} does not take arguments = {config.arguments}: {error}") from None
    return made


def is_corpus(step: Step | CorpusStep) -> bool:
    """Whether a step compares documents with each other."""
    return all(hasattr(step, method) for method in CORPUS_METHODS)
