"""Labels for texts from a large language model, to train the small classifier with (`data/steps/classify.py`).

The model is asked for a whole number on a short additive scale, with its reason first, as for FineWeb-Edu (Penedo et al. 2024, arXiv
2406.17557, section 4). Who answers is behind one function from prompts to answers: an OpenAI-compatible endpoint, which is here, or an
engine in this process, which this room does not know.

Results are appended to a JSONL file in the order of the texts; a run that is started again goes on where the file ends.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from gemel.config.data.rules import LabelConfig
from gemel.config.errors import CheckpointError, ConfigError
from gemel.data.steps.classify import Labelled

RETRY_AFTER_S = (1.0, 4.0, 16.0)  # an overloaded server answers again within seconds, or it is down
_RETRIED = (408, 429, 500, 502, 503, 504)
_SCORE = re.compile(r"(?:score|rating|评分|分数|得分)\W{0,6}([0-9]{1,3})(?![0-9]|\.[0-9])", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![0-9.])([0-9]{1,3})(?![0-9]|\.[0-9])")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, or why there is no answer."""

    text: str
    error: str = ""


Ask = Callable[[Sequence[str]], list[Answer]]  # one answer per prompt, in order


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file of labels. Without a score, `error` is `label.unreadable` or `label.failed`, and `answer` says more."""

    id: str
    text: str
    score: int | None
    answer: str
    error: str = ""


class Endpoint:
    """A model behind an OpenAI-compatible HTTP API."""

    def __init__(self, config: LabelConfig, api_key: str = ""):
        self.config = config
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._url = config.endpoint.rstrip("/") + "/chat/completions"

    def __call__(self, prompts: Sequence[str]) -> list[Answer]:
        """Ask all, some at once.

        Raises ConfigError: the endpoint answers none of them, so asking more would only take time.
        """
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            answers = list(pool.map(self._ask, prompts))
        if answers and all(answer.error for answer in answers):
            raise ConfigError(f"no answer to any of {len(answers)} requests: {answers[0].error}; the same command goes on from here")
        return answers

    def _ask(self, prompt: str) -> Answer:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": self.config.max_tokens}
        request = Request(self._url, json.dumps(body).encode(), self._headers)
        error = ""
        for wait_s in (0.0, *RETRY_AFTER_S):
            time.sleep(wait_s)
            try:
                with urlopen(request, timeout=self.config.timeout_s) as response:
                    return Answer(json.load(response)["choices"][0]["message"]["content"] or "")
            except HTTPError as failure:
                error = f"HTTP {failure.code}: {failure.read(500).decode('utf-8', 'replace')}"
                if failure.code in (401, 403, 404):
                    raise ConfigError(f"{self._url} says {error}: check the endpoint, the model's name and the key") from None
                if failure.code not in _RETRIED:
                    break
            except (URLError, TimeoutError, ConnectionError) as failure:
                error = f"{self._url}: {getattr(failure, 'reason', failure)}"
            except (ValueError, LookupError, TypeError):
                return Answer("", f"{self._url} does not answer like chat/completions of OpenAI")
        return Answer("", error)


def prompt_for(text: str, config: LabelConfig) -> str:
    """What the model is asked about a text. Braces in the text mean nothing."""
    return config.prompt.replace("{most}", str(config.most)).replace("{text}", text[: config.max_characters])


def read_score(answer: str, most: int) -> int | None:
    """The score in an answer: the last number after the word, else the last number on its last line; None if that is not on the scale."""
    named = _SCORE.findall(answer)
    last_line = answer.strip().rpartition("\n")[2]
    numbers = named or _NUMBER.findall(last_line.replace(f"/{most}", "").replace(f"out of {most}", ""))
    return int(numbers[-1]) if numbers and int(numbers[-1]) <= most else None


def label(texts: Iterable[tuple[str, str]], ask: Ask, config: LabelConfig) -> Iterator[Row]:
    """One row per (id, text), in order, asked for in batches."""
    source = iter(texts)
    while batch := list(islice(source, config.batch)):
        answers = ask([prompt_for(text, config) for _, text in batch])
        for (name, text), answer in zip(batch, answers, strict=True):
            score = None if answer.error else read_score(answer.text, config.most)
            error = "label.failed" if answer.error else "label.unreadable" if score is None else ""
            yield Row(name, text, score, answer.error or answer.text, error)


def write(texts: Iterable[tuple[str, str]], ask: Ask, config: LabelConfig, file: Path) -> dict[str, int]:
    """Appends labels of those texts that the file does not have yet; how many got a label, and how many not for which reason.

    Rows that failed are asked again by the next run; readers take the last row of an id.
    """
    _mend(file)
    done = {row["id"] for row in read_rows(file) if not row.get("error")} if file.exists() else set()
    counts: dict[str, int] = {"label.there_already": len(done)} if done else {}
    with file.open("a", encoding="utf-8") as out:
        for row in label(((name, text) for name, text in texts if name not in done), ask, config):
            name = row.error or "label.done"
            counts[name] = counts.get(name, 0) + 1
            values = {key: getattr(row, key) for key in ("id", "text", "score", "answer", "error")}
            out.write(json.dumps(values, ensure_ascii=False) + "\n")
            out.flush()
    return counts


def _mend(file: Path) -> None:
    """Cuts off the line that a killed run left unfinished."""
    if file.exists():
        with file.open("rb+") as rows:
            data = rows.read()
            rows.truncate(data.rfind(b"\n") + 1)


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, perhaps gzipped. A last line that a killed run left unfinished is passed over."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith("\n"):
                    return
                raise CheckpointError(f"{file}, line {number}: not JSON: {line[:80]!r}") from None
            if not isinstance(row, dict):
                raise CheckpointError(f"{file}, line {number}: not an object: {line[:80]!r}")
            yield row


def read_texts(files: Iterable[Path], field: str = "text") -> Iterator[tuple[str, str]]:
    """(id, text) of the documents in files: JSONL with a field for the text, or plain text, one document a file; .gz is undone."""
    for file in files:
        if ".jsonl" not in file.suffixes and ".json" not in file.suffixes:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            yield str(file), data.decode("utf-8", "replace")
            continue
        for number, row in enumerate(read_rows(file)):
            if not isinstance(text := row.get(field), str):
                raise ConfigError(f"{file}, row {number + 1} has no text under {field!r}; it has {', '.join(row)}: choose with --field")
            yield str(row.get("id", f"{file}:{number}")), text


def read_labelled(files: Iterable[Path], good_from: float, label_field: str = "score", text_field: str = "text") -> Iterator[Labelled]:
    """Labelled texts; a label is true or false, or a number that is good from `good_from` on. Rows of failed requests are passed over.

    Of several rows with one id, the last counts.
    """
    rows = {str(row.get("id", (file, number))): row for file in files for number, row in enumerate(read_rows(file)) if not row.get("error")}
    for name, row in rows.items():
        text, value = row.get(text_field), row.get(label_field)
        if not isinstance(text, str) or not isinstance(value, bool | int | float):
            raise ConfigError(
                f"row {name} needs a text under {text_field!r} and true, false or a number under {label_field!r}; it has {', '.join(row)}"
            )
        yield Labelled(text, value if isinstance(value, bool) else value >= good_from)
