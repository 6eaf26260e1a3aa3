"""From a recipe's tables to the objects that do the work. Imports happen here, so a run loads only what its recipe names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from gemel.config.base import Config
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
from gemel.config.data.rules import (
    ClassifyConfig,
    ExtractConfig,
    LanguageConfig,
    PerplexityConfig,
    PiiConfig,
    QualityConfig,
    RepairConfig,
    SampleConfig,
    UrlConfig,
)
from gemel.config.errors import ConfigError
from gemel.data.read.reader import Reader
from gemel.data.step import CorpusStep, Step
from gemel.data.write import Writer

# One line a step, for there are many: its configuration, and the class in `gemel.data.steps` that takes it.
STEPS: dict[type[Config], str] = {
    UrlConfig: "url:Url",
    ExtractConfig: "extract:Extract",
    RepairConfig: "repair:Repair",
    LanguageConfig: "language:Language",
    LengthConfig: "length:Length",
    QualityConfig: "quality:Quality",
    PerplexityConfig: "perplexity:Perplexity",
    ClassifyConfig: "classify:Classify",
    PiiConfig: "pii:Pii",
    ExactConfig: "exact:Exact",
    ExactPartsConfig: "exact:ExactParts",
    MinHashConfig: "minhash:MinHash",
    LinesConfig: "lines:Lines",
    DecontaminateConfig: "decontaminate:Decontaminate",
    SampleConfig: "sample:Sample",
    MixConfig: "mix:Mix",
}
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
    if isinstance(config, CustomConfig):
        return custom(config)
    module, _, attribute = STEPS[type(config)].partition(":")
    made: Step | CorpusStep = getattr(import_module(f"gemel.data.steps.{module}"), attribute)(config)
    return made


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
