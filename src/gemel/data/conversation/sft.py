"""The whole job: files of any shape in, one file of conversations out, one of what was dropped, and a report that accounts for every row.

    read -> the recipe's steps, in their order -> conversations.jsonl, dropped.jsonl, report.json

Files are written under temporary names and renamed when all are whole, so a folder has a complete result or none.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gemel.config.data.conversation import (
    ChainOfThoughtStep,
    ConversationStep,
    DataSet,
    FewShotStep,
    LanguageStep,
    LengthStep,
    MismatchStep,
    NearDuplicateStep,
    ParaphraseStep,
    RefusalStep,
    ScoreStep,
    SftRecipe,
)
from gemel.config.errors import ConfigError
from gemel.data.conversation import augment, diversity, quality, salvage
from gemel.data.conversation.read import conversations
from gemel.data.document import Document, Dropped
from gemel.data.read import files
from gemel.tokenizer.conversation import Conversation

SUFFIXES = (".jsonl", ".ndjson", ".json")
Judge = Callable[[str], quality.Gain]
OUTPUTS = ("conversations.jsonl", "dropped.jsonl", "report.json")


@dataclass
class Tally:
    """What became of one file's rows."""

    rows: int = 0
    rows_with_conversations: int = 0
    conversations: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        counts = {"rows": self.rows, "rows_with_conversations": self.rows_with_conversations, "conversations": self.conversations}
        return {**counts, "lost": dict(self.lost.most_common()), "repaired": dict(self.repaired.most_common())}


def run(paths: Sequence[str], recipe: SftRecipe, out: Path, judge: Judge | None = None) -> dict[str, Any]:
    """Read, choose, add, write; returns the report. `out` must be new or empty. Errors: `ConfigError`.

    `judge` loads the model that a `mismatch` step names.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give another one, or remove it")
    tallies: dict[str, Tally] = {}
    kept: list[Conversation] = []
    dropped: list[Dropped] = []
    for file in files.find(paths, SUFFIXES):
        tally = tallies[file.path] = Tally()
        for answer in read(file.path, recipe, tally):
            (dropped if isinstance(answer, Dropped) else kept).append(answer)  # type: ignore[arg-type]
    steps = []
    for step in recipe.step:
        before = len(kept)
        answers = list(apply(step, kept, judge))
        kept = [answer for answer in answers if not isinstance(answer, Dropped)]
        gone = [answer for answer in answers if isinstance(answer, Dropped)]
        dropped += gone
        reasons = dict(Counter(answer.reason for answer in gone).most_common())
        steps.append({"kind": step.kind, "before": before, "after": len(kept), "dropped": reasons, "added": len(answers) - before})
    report = {
        "files": {path: tally.as_json() for path, tally in tallies.items()},
        "steps": steps,
        "kept": len(kept),
        "pairs": sum(bool(conversation.rejected) for conversation in kept),
        "dropped": dict(Counter(answer.reason for answer in dropped).most_common()),
        "diversity": diversity.report(kept),
    }
    _write(out, kept, dropped, report)
    return report


def read(path: str, recipe: SftRecipe, tally: Tally) -> Iterator[Conversation | Dropped]:
    """The conversations of one file and what is lost in it; every row is one or the other, and `tally` counts them."""
    name = Path(path).name
    data_set = next((table for table in recipe.dataset if fnmatch(name, table.files)), DataSet(files="*"))
    source = data_set.source or name.split(".")[0]
    for found in salvage.read(path):
        place = f"{name}: {found.place}"
        if isinstance(found, salvage.Lost):
            tally.rows += bool(found.text)  # damage of the file as a whole is no row
            tally.lost[found.reason] += 1
            yield Dropped(Document(found.text, place, source), found.reason, found.detail)
            continue
        answers = conversations(found.value, data_set, source, place, found.repairs)
        made = [answer for answer in answers if not isinstance(answer, Dropped)]
        tally.rows += 1
        tally.rows_with_conversations += bool(made)
        tally.conversations += len(made)
        tally.lost.update(answer.reason for answer in answers if isinstance(answer, Dropped))
        for conversation in made[:1]:
            tally.repaired.update(conversation.metadata.get("counts", {}))
        yield from answers
    if not tally.rows and not tally.lost:
        tally.lost["sft.empty_file"] += 1
        yield Dropped(Document("", name, source), "sft.empty_file", "there is nothing in it")


def apply(step: ConversationStep, conversations: Sequence[Conversation], judge: Judge | None = None) -> Iterable[Conversation | Dropped]:
    """One step over all conversations."""
    match step:
        case LengthStep():
            return quality.length(conversations, step)
        case RefusalStep():
            return quality.refusal(conversations, step)
        case LanguageStep():
            return quality.language(conversations, step)
        case MismatchStep():
            if judge is None:
                raise ConfigError("a step of kind 'mismatch' needs a model to judge with: run `gemel data sft`, or give sft.run a judge")
            return quality.mismatch(conversations, step, judge(step.model))
        case ScoreStep():
            return quality.score(conversations, step)
        case NearDuplicateStep():
            return quality.near_duplicate(conversations, step)
        case ParaphraseStep():
            return augment.paraphrase(conversations, step)
        case FewShotStep():
            return augment.few_shot(conversations, step)
        case ChainOfThoughtStep():
            return augment.chain_of_thought(conversations, step)


def _write(out: Path, kept: Sequence[Conversation], dropped: Sequence[Dropped], report: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lost = [
        {"reason": d.reason, "detail": d.detail, "id": d.document.id, "source": d.document.source, "text": d.document.text} for d in dropped
    ]
    contents = (_lines(conversation.as_json() for conversation in kept), _lines(lost), [json.dumps(report, ensure_ascii=False, indent=1)])
    drafts = [out / f".{name}.tmp" for name in OUTPUTS]
    for draft, content in zip(drafts, contents, strict=True):
        with draft.open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
    for draft, name in zip(drafts, OUTPUTS, strict=True):
        draft.replace(out / name)


def _lines(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        try:
            line = json.dumps(value, ensure_ascii=False)
            line.encode()
        except UnicodeEncodeError:  # a lone surrogate cannot be written in UTF-8, but as an escape
            line = json.dumps(value)
        yield line + "\n"
