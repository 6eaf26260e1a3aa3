"""From what a recipe names to documents of token ids: text is cleaned, the tokenizer learnt, text and conversations are tokenized.

    out/tokenizer/      learnt, if the recipe says so
    out/data/NAME/      token ids of a source of documents or conversations

All of it is done once, and again if what it was made of has changed, which each folder has noted. A run that was killed goes on here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from gemel.config.data import pipeline
from gemel.config.data.pipeline import Input, JsonlInput, JsonlOutput, Recipe, TokensOutput
from gemel.config.errors import ConfigError, RequestError
from gemel.config.sources import (
    AnySource,
    ConversationSource,
    DocumentSource,
    LearntTokenizer,
    LoadedTokenizer,
    PretrainedModel,
    ShardSource,
)
from gemel.config.tokenizer import TrainConfig
from gemel.config.train import TrainRecipe
from gemel.data import build, manifest
from gemel.data.document import Dropped
from gemel.data.pipeline import Job
from gemel.data.read.reader import Reading
from gemel.data.run import start
from gemel.data.run.board import Board, Interrupted, StopRequest
from gemel.data.run.local import TaskFailed
from gemel.data.shards import TokenShards
from gemel.tokenizer.conversation import Conversation
from gemel.tokenizer.mask import encode_turns
from gemel.tokenizer.tokenizer import Tokenizer
from gemel.train import documents
from gemel.train.batch import TRAINED
from gemel.train.documents import ConversationDocuments, ShardDocuments
from gemel.train.loader import Documents, Source
from gemel.train.progress import Progress

UNIT_BYTES = 4_000_000  # of compressed text: small enough that a small corpus is work for all cores
MADE_OF = "made_of.json"


class Preparation:
    """What a run needs before its first step."""

    def __init__(self, recipe: TrainRecipe, progress: Progress, quiet: bool = False, folder: Path | None = None):
        self._recipe, self._out, self._progress = recipe, folder or recipe.out, progress
        self._board = Board(quiet=quiet)

    def tokenizer(self) -> Tokenizer:
        """Loaded, or learnt."""
        match self._recipe.tokenizer:
            case LearntTokenizer(config=config):
                return Tokenizer.load(self._learn(config))
            case LoadedTokenizer(path=path):
                return Tokenizer.load(path)
            case None:
                assert isinstance(self._recipe.model, PretrainedModel)
                return Tokenizer.load(self._recipe.model.path)

    def sources(self, tokenizer: Tokenizer) -> tuple[list[Source], list[Source]]:
        """To train on, and to validate on. The latter are what was held out of the former, and what the recipe names for it."""
        data, seed = self._recipe.data, self._recipe.seed
        _check_names([name_of(source) for source in (*data.train, *data.validation)])
        training: list[Source] = []
        validation: list[Source] = []
        for number, source in enumerate(data.train):
            found = self._documents(source, tokenizer)
            if data.holdout:
                found, held = documents.hold_out(found, data.holdout, seed)
                validation.append(self._source(source, held, seed))
            training.append(self._source(source, found, seed + number))
        validation += [self._source(source, self._documents(source, tokenizer), seed) for source in data.validation]
        return training, validation

    def _source(self, source: AnySource, found: Documents, seed: int) -> Source:
        packing = "best_fit" if isinstance(source, ConversationSource) else source.packing
        return Source(name_of(source), found, packing, self._recipe.batch.sequence, seed, source.weight)

    def _documents(self, source: AnySource, tokenizer: Tokenizer) -> Documents:
        match source:
            case ShardSource(path=path):
                return _shards(path, tokenizer)
            case DocumentSource():
                return _shards(self._tokenized(source, tokenizer), tokenizer)
            case ConversationSource():
                return self._conversations(source, tokenizer)

    def _learn(self, config: TrainConfig) -> Path:
        sources = (*self._recipe.data.train, *self._recipe.data.validation)
        inputs = [self._text(source) for source in sources if isinstance(source, DocumentSource)]

        def learn(draft: Path) -> None:
            from gemel.tokenizer.train import train

            self._progress.say(f"learning a tokenizer of {config.vocab_size:,} tokens")
            train(_texts(inputs), config).save(draft)

        return self._made("tokenizer", [*map(_text_checksum, inputs), config.model_dump_json()], learn)

    def _text(self, source: DocumentSource) -> Input:
        """Where the text is, once it is cleaned."""
        recipe = pipeline.load(source.recipe)
        if not isinstance(recipe.output, JsonlOutput):
            raise ConfigError(
                f"{source.recipe} writes {recipe.output.kind}, but text in JSON lines is needed: set output.kind = 'jsonl' there"
            )
        folder = Path(recipe.output.path or self._out / "text" / name_of(source))
        self._run(recipe.model_copy(update={"output": recipe.output.model_copy(update={"path": str(folder)})}), f"cleaning {source.recipe}")
        return JsonlInput(kind="jsonl", paths=(str(folder / "kept"),), unit_bytes=UNIT_BYTES)

    def _tokenized(self, source: DocumentSource, tokenizer: Tokenizer) -> Path:
        """A folder of token shards. They are made in place, so that what is there of them need not be made again."""
        config, folder = self._recipe.tokenizer, self._out / "data" / name_of(source)
        named = config.end_of_document if isinstance(config, LearntTokenizer) else tokenizer.named.get("eos_token")
        end = source.end_of_document or named
        if end is None:
            raise ConfigError(f"the tokenizer names no EOS to end documents of {name_of(source)} with: set end_of_document of that source")
        text = self._text(source)
        made_of = [_text_checksum(text), _checksum(tokenizer), end]
        if (before := _made_of(folder)) != made_of:
            if before is not None:
                shutil.rmtree(folder)
            files = self._made("tokenizer", [_checksum(tokenizer)], tokenizer.save) if not isinstance(config, LearntTokenizer) else None
            output = TokensOutput(kind="tokens", path=str(folder), tokenizer=files or self._out / "tokenizer", end_of_document=end)
            self._run(Recipe(input=(text,), output=output), f"tokenizing {name_of(source)}")
            manifest.write_file(folder, MADE_OF, orjson.dumps(made_of))
        return folder

    def _run(self, recipe: Recipe, what: str) -> None:
        """Do what is missing of a data recipe; nothing is said of one that is finished."""
        assert recipe.output.path is not None
        job = Job.begin(recipe, Path(recipe.output.path))
        if not job.finished:
            self._progress.say(f"{what} into {recipe.output.path}")
            try:
                with StopRequest(self._board) as stop:
                    start.run(recipe, self._board, stop)
            except TaskFailed as error:
                raise ConfigError(f"{what}: {error}; the same command goes on from there when that is mended") from None
            if stop.asked:
                raise Interrupted
        if job.finished and not job.stats().kept.documents:
            raise ConfigError(f"{what} leaves nothing of its input; see why with: gemel data inspect {recipe.output.path}")

    def _conversations(self, source: ConversationSource, tokenizer: Tokenizer) -> Documents:
        name, length = name_of(source), self._recipe.batch.sequence

        def encode(draft: Path) -> None:
            if not tokenizer.has_chat_template:
                raise ConfigError("the tokenizer has no chat template to render conversations with: put a chat_template.jinja beside it")
            sequences = _Sequences(source, tokenizer, length)
            if not ConversationDocuments.write(draft, sequences):
                raise ConfigError(f"no conversation of {name} can be trained: {sequences.reasons or 'there are none'}")
            if sequences.left_out:
                self._progress.say(f"{name}: {sequences.left_out.total()} of {sequences.num} sequences are left out: {sequences.reasons}")

        if missing := [path for path in source.paths if not path.is_file()]:
            raise ConfigError(f"{name}: there is no file {missing[0]}; make conversations with: gemel data sft FILES --out DIR")
        made_of = [*map(manifest.checksum, source.paths), _checksum(tokenizer), source.too_long, str(length)]
        return ConversationDocuments(self._made(f"data/{name}", made_of, encode))

    def _made(self, name: str, made_of: list[str], make: Callable[[Path], object]) -> Path:
        """A folder of the run that holds what `make` puts there; made anew if it was made of something else."""
        folder = self._out / name
        if _made_of(folder) != made_of:
            (self._out / "work" / "tmp").mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(dir=self._out / "work" / "tmp"))
            make(draft)
            (draft / MADE_OF).write_bytes(orjson.dumps(made_of))
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            draft.replace(folder)
        return folder


def name_of(source: AnySource) -> str:
    """What metrics and folders call it."""
    match source:
        case ShardSource(path=path):
            return source.name or path.name
        case DocumentSource(recipe=recipe):
            return source.name or recipe.stem
        case ConversationSource(paths=paths):
            return source.name or paths[0].stem


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{count} sources of [data] are called {name!r}; give each a name of its own")


def _shards(path: Path, tokenizer: Tokenizer) -> ShardDocuments:
    shards = TokenShards.open(path)
    if shards.vocabulary.tokenizer != _checksum(tokenizer):
        raise ConfigError(
            f"{path} was written with another tokenizer than this run's; tokenize it again, or name that tokenizer in [tokenizer]"
        )
    return ShardDocuments(shards)


def _checksum(tokenizer: Tokenizer) -> str:
    """As token shards have it."""
    return xxhash.xxh3_128_hexdigest(tokenizer.library.to_str().encode())


def _text_checksum(text: Input) -> str:
    """Of what a data recipe wrote."""
    assert isinstance(text, JsonlInput)
    return manifest.checksum(Path(text.paths[0]).parent / "manifest.json")


def _made_of(folder: Path) -> list[str] | None:
    """What is noted in a folder about what it was made of; None if it is not there, or not whole."""
    try:
        found: list[str] = orjson.loads((folder / MADE_OF).read_bytes())
    except FileNotFoundError:
        return None
    return found


def _texts(inputs: Sequence[Input]) -> Iterator[str]:
    for config in inputs:
        reader = build.reader(config)
        for piece in reader.pieces():
            yield from (item.text for item in reader.read(piece, Reading()) if not isinstance(item, Dropped))


class _Sequences:
    """Conversations of a source as token ids marked with what is trained; and how many are left out, by reason."""

    def __init__(self, source: ConversationSource, tokenizer: Tokenizer, length: int):
        self._source, self._tokenizer, self._length = source, tokenizer, length
        self.num = 0
        self.left_out: Counter[str] = Counter()
        self._refusal = ""

    @property
    def reasons(self) -> str:
        """How many are left out and why, as a text; empty if none is."""
        text = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return text + (f"; the first of these: {self._refusal}" if self._refusal else "")

    def __iter__(self) -> Iterator[npt.NDArray[np.uint32]]:
        for path in self._source.paths:
            for conversation in _conversations(path):
                yield from self._encoded(conversation)

    def _encoded(self, conversation: Conversation) -> Iterator[npt.NDArray[np.uint32]]:
        whole = conversation.ending(conversation.chosen) if conversation.chosen else conversation
        try:
            encoded = encode_turns(self._tokenizer, whole)
        except RequestError as error:
            self.num += 1
            self.left_out["refused by the chat template"] += 1
            self._refusal = self._refusal or str(error)
            return
        for ids, trained in encoded:
            self.num += 1
            too_long = len(ids) > self._length + 1
            marked = np.array(ids, np.uint32) | np.where(trained, np.uint32(TRAINED), np.uint32(0))
            if too_long and self._source.too_long == "drop":
                self.left_out[f"longer than {self._length} tokens"] += 1
            elif not any(trained[1 : self._length + 1]):
                self.left_out["without anything to train"] += 1
            else:
                yield marked[: self._length + 1]


def _conversations(path: Path) -> Iterator[Conversation]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Conversation.from_json(orjson.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise ConfigError(
                    f"{path}, line {number} is no conversation as gemel data sft writes them ({why}); make some of your rows with: "
                    f"gemel data sft {path} --out DIR, and name DIR/conversations.jsonl"
                ) from None
