"""A data recipe: where documents come from, what is done to them, where they go, and who does the work.

`[input]`, `[[step]]` and `[output]` decide what comes out, to the byte; `[run]` decides only how fast. So everything that cuts the work
into units belongs to the input, and a run may be taken up again with other workers or by another runner.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gemel.config.base import Config
from gemel.config.data.dedup import DecontaminateConfig, ExactConfig, ExactPartsConfig, LinesConfig, MinHashConfig, MixConfig
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

MIB = 2**20

Names = Annotated[tuple[str, ...], Field(min_length=1)]


class InputConfig(Config):
    """What all inputs share.

    source              name of this collection, for counting and mixing; empty takes the input's kind
    max_document_bytes  a longer line, file or record is dropped with a reason and its beginning, so that memory stays bounded
    unit_bytes          a unit of work is about so much of the input, as stored; smaller units lose less when a run is killed
    """

    source: str = ""
    max_document_bytes: Annotated[int, Field(ge=1024)] = 16 * MIB
    unit_bytes: Annotated[int, Field(ge=1024)] = 32 * MIB


class FileInput(InputConfig):
    """Inputs that are files.

    paths  files, folders (searched for the kind's usual suffixes), globs with * ? [] **, or fsspec URLs of these (s3://, https://, ...).
           Relative ones start at the working directory. What the file's last suffix says is undone: .gz .zst .bz2 .xz
    """

    paths: Names


class RowInput(FileInput):
    """Inputs whose documents have named fields. All other fields go into the metadata, and so does what a field `metadata` holds.

    text_field    holds the text; a row without it is dropped as `read.no_text`
    id_field      holds the document's name; a row without it is named after its file and place
    source_field  a row that has it belongs to that collection instead of to `source`
    """

    text_field: str = "text"
    id_field: str = "id"
    source_field: str = "source"


class JsonlInput(RowInput):
    """One JSON object per line."""

    kind: Literal["jsonl"]


class ParquetInput(RowInput):
    """One row per document. The row group is the smallest part that one worker reads."""

    kind: Literal["parquet"]


class TextInput(FileInput):
    r"""Plain text in UTF-8.

    separator  what stands between documents: "\n" makes each line one, "\n\n" each paragraph; without it a file is one document
    """

    kind: Literal["text"]
    separator: Annotated[str, Field(min_length=1)] | None = None


class MarkdownInput(FileInput):
    """One Markdown file per document. A front matter block (between lines of `---`) goes into the metadata, the first heading too."""

    kind: Literal["markdown"]


class HtmlInput(FileInput):
    """One HTML file per document, decoded as its byte order mark or `<meta charset>` says. The text is the page's source."""

    kind: Literal["html"]


class WarcInput(FileInput):
    """Web archives (WARC 1.0 and 1.1). The text is the source of each page that a server sent.

    content_types  pages of other types are dropped as `read.content_type`
    """

    kind: Literal["warc"]
    content_types: Names = ("text/html", "application/xhtml+xml")


class WetInput(FileInput):
    """Common Crawl's text extracts: the `conversion` records of a WARC file."""

    kind: Literal["wet"]


class PackageInput(InputConfig):
    """Sources of installed Python packages: found by name, read as files, never imported.

    names    packages or modules as they are imported; `stdlib` stands for the standard library
    part     `source` gives each module's file, `docstring` each docstring of a module, class or function
    exclude  files and folders of these names inside a package are left out
    """

    kind: Literal["package"]
    names: Names
    part: Literal["source", "docstring"] = "source"
    exclude: tuple[str, ...] = ("test", "tests", "idlelib", "lib2to3")


Input = Annotated[
    JsonlInput | ParquetInput | TextInput | MarkdownInput | HtmlInput | WarcInput | WetInput | PackageInput, Field(discriminator="kind")
]


class LengthConfig(Config):
    """Drops documents with too few or too many characters.

    min_chars, max_chars  limits that a document may reach
    """

    kind: Literal["length"]
    min_chars: NonNegativeInt = 0
    max_chars: PositiveInt | None = None

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is less than min_chars = {self.min_chars}: nothing would be kept")
        return self


class CustomConfig(Config):
    """A step of your own: a class with the methods of `gemel.data.step.Step` or `CorpusStep`.

    target     where the class is, as `package.module:Class`
    name       how reports call it; empty takes the class's name
    arguments  its constructor's keyword arguments
    """

    kind: Literal["custom"]
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    name: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)


StepConfig = Annotated[
    UrlConfig
    | ExtractConfig
    | RepairConfig
    | LanguageConfig
    | LengthConfig
    | QualityConfig
    | PerplexityConfig
    | ClassifyConfig
    | PiiConfig
    | ExactConfig
    | ExactPartsConfig
    | MinHashConfig
    | LinesConfig
    | DecontaminateConfig
    | SampleConfig
    | MixConfig
    | CustomConfig,
    Field(discriminator="kind"),
]


class OutputConfig(Config):
    """What all outputs share.

    path  folder of the result: new, empty, or with a run of the same recipe, which is then continued. The command line may give it instead
    """

    path: Annotated[str, Field(min_length=1)] | None = None


class JsonlOutput(OutputConfig):
    """Lines {text, id, source, metadata}, one file per unit of work."""

    kind: Literal["jsonl"]
    compression: Literal["zst", "gz", "none"] = "zst"


class ParquetOutput(OutputConfig):
    """Columns text, id, source and metadata (as JSON text, so that all files have one schema), one file per unit of work."""

    kind: Literal["parquet"]
    compression: Literal["zstd", "snappy", "none"] = "zstd"


class TokensOutput(OutputConfig):
    """Token shards for training, mapped into memory when read, one file per unit of work.

    tokenizer        folder with a tokenizer.json, or the path of that file
    end_of_document  special token that is appended to every document, as the tokenizer spells it
    """

    kind: Literal["tokens"]
    tokenizer: Path
    end_of_document: str


Output = Annotated[JsonlOutput | ParquetOutput | TokensOutput, Field(discriminator="kind")]


class LocalRun(Config):
    """Processes of this machine.

    workers  how many; None takes the cores that this process may use
    """

    kind: Literal["local"] = "local"
    workers: PositiveInt | None = None


class SlurmRun(Config):
    """One member of a SLURM job array, or of any other set of processes that share the output folder.

    rank, world  this member and how many there are; None takes SLURM_ARRAY_TASK_ID (less SLURM_ARRAY_TASK_MIN) and SLURM_ARRAY_TASK_COUNT
    workers      processes of this member; None takes the cores that it may use
    wait_s       longest wait for other members before a stage that needs all of the one before; then exit status 75
    """

    kind: Literal["slurm"]
    rank: NonNegativeInt | None = None
    world: PositiveInt | None = None
    workers: PositiveInt | None = None
    wait_s: NonNegativeFloat = 600.0


class RayRun(Config):
    """Tasks of a Ray cluster whose machines all see the output folder.

    address  of a running cluster; None starts Ray on this machine
    workers  tasks at once; None takes the cluster's CPUs
    """

    kind: Literal["ray"]
    address: str | None = None
    workers: PositiveInt | None = None


Run = Annotated[LocalRun | SlurmRun | RayRun, Field(discriminator="kind")]


class Recipe(Config):
    """A whole run. `[input]` is one table, or several as `[[input]]`; steps act in the order in which they stand."""

    input: Annotated[tuple[Input, ...], Field(min_length=1)]
    step: tuple[StepConfig, ...] = ()
    output: Output
    run: Run = LocalRun()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """As `Config.parse`; a mistake in a table is reported with the keys of that table's own kind."""
        tables = dict(values)
        if isinstance(tables.get("input"), Mapping):
            tables["input"] = [tables["input"]]
        for name in ("input", "step"):
            rows = tables.get(name, [])
            if not isinstance(rows, Sequence) or isinstance(rows, str):
                raise ConfigError(f"{name} is {rows!r}, but must be tables: write [[{name}]]")
            for number, row in enumerate(rows):
                _check_table(f"{name}.{number}", row, {"input": Input, "step": StepConfig}[name])
        for name, union in (("output", Output), ("run", Run)):
            if name in tables:
                _check_table(name, tables[name], union)
        return super().parse(tables)

    def what(self) -> dict[str, Any]:
        """All that decides what comes out: everything but who does the work, and where the result lies."""
        return self.model_dump(mode="json", exclude={"run": True, "output": {"path"}}, exclude_none=True)

    def files(self) -> tuple[Path, ...]:
        """Files and folders, beside the input, that steps and output read: word lists, models, tokenizers. Each once, by name.

        A step of the user's own keeps its files to itself.
        """
        return tuple(sorted({path for part in (*self.step, self.output) for path in _paths(part)}))


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, Config):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, tuple):
        for member in value:
            yield from _paths(member)


def load(path: Path, settings: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `key=value` settings put over it. Errors: `ConfigError`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for setting in settings:
        put(values, setting)
    return Recipe.parse(values)


def put(values: dict[str, Any], setting: str) -> None:
    """Put one `a.b.0.c=value` into nested tables. The value is TOML where it can be read as such, else text."""
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise ConfigError(f"{setting!r} is not a setting; write table.key=value, for example run.workers=2 or step.0.min_chars=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    place(values, key.strip(), value, setting)


def place(values: dict[str, Any], key: str, value: Any, setting: str) -> None:
    """Put a value at `a.b.0.c` of nested tables. `setting` is what messages call it."""
    *outer, last = key.split(".")
    inner: Any = values
    for part in outer:
        inner = _member(inner, part, setting) if isinstance(inner, list) else inner.setdefault(part, {})
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{setting!r}: {part} is {inner!r}, which has no keys")
    if isinstance(inner, list):
        _member(inner, last, setting)
        inner[int(last)] = value
    else:
        inner[last] = value


def _member(rows: list[Any], part: str, setting: str) -> Any:
    if not part.isdigit() or int(part) >= len(rows):
        raise ConfigError(f"{setting!r}: {part!r} is not the number of a table; there are {len(rows)}, counted from 0")
    return rows[int(part)]


def _check_table(where: str, table: Any, union: Any) -> None:
    """Parse one table as the member of the union that its `kind` names, so that errors speak of that member."""
    members = {get_args(member.model_fields["kind"].annotation)[0]: member for member in get_args(get_args(union)[0])}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {table!r}, but must be a table")
    if "kind" not in table:
        raise ConfigError(f"{where} has no kind; it is one of {', '.join(members)}")
    if table["kind"] not in members:
        near = difflib.get_close_matches(str(table["kind"]), members, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(members)}"
        raise ConfigError(f"{where}.kind = {table['kind']!r} is not known: {hint}")
    try:
        members[table["kind"]].parse(table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
