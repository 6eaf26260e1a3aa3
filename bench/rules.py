"""Measures the steps that look at one document at a time: how well they do it, and how fast.

    python bench/rules.py extract PAGES.jsonl.gz        rows: html, gold_text
    python bench/rules.py language SENTENCES.jsonl.gz   rows: text, lang (fra_Latn)
    python bench/rules.py steps TEXTS.jsonl.gz ...      rows: text
    python bench/rules.py verdicts TEXTS.jsonl.gz --peer-python PYTHON [--language cmn_Hani]

`extract` scores as Scrapinghub's article extraction benchmark does: counts of the 4-grams of words that a page's text shares with the gold
text and does not share, precision and recall as means over pages. `verdicts` compares with the filters of datatrove, which an interpreter
of its own runs; its key for Chinese is cmn_Hani, because with zh it does not split words. Times are of the processor, in this process.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemel.config.data.rules import ExtractConfig, LanguageConfig, PiiConfig, QualityConfig, RepairConfig, UrlConfig
from gemel.data.document import Document, Dropped
from gemel.data.step import Step
from gemel.data.steps.extract import Extract
from gemel.data.steps.language import Language
from gemel.data.steps.pii import Pii
from gemel.data.steps.quality import Quality
from gemel.data.steps.repair import Repair
from gemel.data.steps.url import Url

CODES = {"arb": "ar", "ces": "cs", "deu": "de", "ell": "el", "eng": "en", "fra": "fr", "hin": "hi", "ind": "id", "ita": "it", "jpn": "ja"}
CODES |= {"kor": "ko", "nld": "nl", "pol": "pl", "por": "pt", "rus": "ru", "spa": "es", "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi"}
CODES |= {"zho": "zh"}
_WORD = re.compile(r"\w+")
# What each filter of datatrove judges, as rules that are off while it is compared.
_GRAMS = tuple(f"gopher.top_{n}_gram" for n in (2, 3, 4)) + tuple(f"gopher.duplicate_{n}_gram" for n in range(5, 11))
_GOPHER_REPEATS = (
    *_GRAMS,
    *(f"gopher.duplicate_{what}" for what in ("lines", "line_characters", "paragraphs", "paragraph_characters")),
)

PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
stop_words, language, texts = json.load(sys.stdin)
gopher = {} if language == "eng" else {"stop_words": stop_words, "min_avg_word_length": None}
own = {"language": language} if language != "eng" else {}
filters = [GopherQualityFilter(**gopher, **own), GopherRepetitionFilter(**own), C4QualityFilter(filter_no_terminal_punct=False, **own),
           FineWebQualityFilter(**own)]
for one in filters:
    one.filter(Document(text=texts[0], id="0"))
rows, begin = [], time.process_time()
for text in texts:
    document, row = Document(text=text, id="0"), []
    for one in filters:
        row.append(document.text)
        try:
            verdict = one.filter(document)
        except ZeroDivisionError:
            verdict = (False, "division by zero")
        row.append("" if verdict is True else verdict[1] if isinstance(verdict, tuple) else "dropped")
    rows.append(row)
print("RESULT" + json.dumps([time.process_time() - begin, rows]))
"""


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, perhaps gzipped."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def timed(step: Step, texts: Sequence[str]) -> tuple[float, list[Document | Dropped]]:
    """Processor seconds and answers, in batches of 256, after a warm-up."""
    list(step([Document(text, "http://a.org/x", "bench") for text in texts[:16]]))
    documents = [Document(text, f"http://site{number}.org/{number}", "bench") for number, text in enumerate(texts)]
    begin = time.process_time()
    answers = [answer for i in range(0, len(documents), 256) for answer in step(documents[i : i + 256])]
    return time.process_time() - begin, answers


def overlap(gold: str, got: str) -> tuple[int, int, int]:
    """4-grams of words: in both, only in what was got, only in the gold text."""
    want, have = (
        Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)) if words) for words in map(_WORD.findall, (gold, got))
    )
    return (want & have).total(), (have - want).total(), (want - have).total()


def extract(args: argparse.Namespace) -> None:
    """F1 and pages per second of both extractors."""
    pages = rows(args.files[0])
    for name in ("fast", "quality"):
        step = Extract(ExtractConfig(extractor=name, min_characters=args.min_characters))
        seconds, answers = timed(step, [page["html"] for page in pages])
        texts = [answer.text if isinstance(answer, Document) else "" for answer in answers]
        counts = [overlap(page["gold_text"], text) for page, text in zip(pages, texts, strict=True)]
        precision = statistics.mean(both / (both + more) for both, more, _ in counts if both + more)
        recall = statistics.mean(both / (both + less) for both, _, less in counts if both + less)
        f1 = 2 * precision * recall / (precision + recall)
        size = sum(len(page["html"].encode()) for page in pages) / 1e6
        speed = f"{len(pages) / seconds:.0f} pages/CPU-s, {size / seconds:.1f} MB/CPU-s"
        print(f"{name:8s} precision {precision:.3f} recall {recall:.3f} F1 {f1:.3f}; {speed}")


def language(args: argparse.Namespace) -> None:
    """Accuracy, with and without a second opinion."""
    sentences = rows(args.files[0])
    for second in (False, True):
        step = Language(LanguageConfig(second_opinion=second, min_score=0.0))
        seconds, answers = timed(step, [row["text"] for row in sentences])
        got = [answer.metadata["language"] for answer in answers if isinstance(answer, Document)]
        wrong = Counter((row["lang"], code) for row, code in zip(sentences, got, strict=True) if CODES[row["lang"][:3]] != code)
        share = 1 - wrong.total() / len(sentences)
        print(f"second opinion {second}: {share:.4f} of {len(sentences)}, {len(sentences) / seconds:.0f} per CPU-s; {wrong.most_common(4)}")


def steps(args: argparse.Namespace) -> None:
    """Megabytes and documents per processor second."""
    made: dict[str, Callable[[], Step]] = {
        "url": lambda: Url(UrlConfig(domains=tuple(f"bad{i}.com" for i in range(100_000)), patterns=("/tag/",))),
        "repair": lambda: Repair(RepairConfig()),
        "language": lambda: Language(LanguageConfig()),
        "quality": lambda: Quality(QualityConfig()),
        "pii": lambda: Pii(PiiConfig()),
    }
    for file in args.files:
        texts = [row["text"] for row in rows(file)]
        size = sum(len(text.encode()) for text in texts) / 1e6
        times = max(1, round(5 / size))
        print(f"{file.name}: {len(texts)} documents, {size:.1f} MB, {times} times")
        for name, make in made.items():
            seconds, _ = timed(make(), texts * times)
            print(f"  {name:10s} {size * times / seconds:8.1f} MB/CPU-s {len(texts) * times / seconds:8.0f} documents/CPU-s")


def verdicts(args: argparse.Namespace) -> None:
    """Agreement with datatrove's filters, each on the text as it comes to it there, and both speeds."""
    texts = [row["text"] for row in rows(args.files[0])]
    stop_words = [word for words in QualityConfig().stop_words.values() for word in words]
    asked = json.dumps([stop_words, args.language, texts])
    done = subprocess.run([args.peer_python, "-c", PEER], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    peer_s, table = json.loads(done.stdout.partition("RESULT")[2])
    punctuation = "c4.line_punctuation"
    off = {
        "gopher quality": ("c4", "fineweb", *_GOPHER_REPEATS),
        "gopher repetition": ("c4", "fineweb", *(rule for rule in _gopher() if rule not in _GOPHER_REPEATS)),
        "c4": ("gopher", "fineweb", punctuation),
        "fineweb": ("gopher", "c4"),
    }
    for number, (name, rules) in enumerate(off.items()):
        _, answers = timed(Quality(QualityConfig(off=rules)), [row[2 * number] for row in table])
        pairs = [
            (row[2 * number + 1], answer.reason if isinstance(answer, Dropped) else "") for row, answer in zip(table, answers, strict=True)
        ]
        differ = Counter(pair for pair in pairs if bool(pair[0]) != bool(pair[1]))
        print(f"{name:18s} agree on {len(pairs) - differ.total()} of {len(pairs)}; theirs, ours: {differ.most_common(4)}")
    seconds, _ = timed(Quality(QualityConfig()), texts)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"datatrove {size / peer_s:.3f} MB/CPU-s, gemel {size / seconds:.2f} MB/CPU-s: {peer_s / seconds:.0f} times")


def _gopher() -> tuple[str, ...]:
    from gemel.config.data.rules import QUALITY_RULES

    return tuple(rule for rule in QUALITY_RULES if rule.startswith("gopher."))


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("extract", "language", "steps", "verdicts"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--min-characters", type=int, default=ExtractConfig().min_characters)
    parser.add_argument("--peer-python", help="an interpreter with datatrove[processing], spacy and jieba")
    parser.add_argument("--language", default="eng", help="datatrove's key of it (default: %(default)s)")
    args = parser.parse_args()
    {"extract": extract, "language": language, "steps": steps, "verdicts": verdicts}[args.what](args)


if __name__ == "__main__":
    main()
