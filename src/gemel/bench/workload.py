"""What a benchmark asks for: prompts as token ids and how many tokens to generate after each.

Generation is greedy and ignores end tokens, so that every engine does exactly the same amount of work on the same file. A workload file is
one JSON object:

    decode       one job: a single stream
    prefillN     one job whose prompt has N tokens; prefillN_alt: more of them, so that repeats never meet a cached prefix
    offline      jobs of mixed lengths, all present at the start
    shared       jobs whose prompts start alike
    server       jobs that a load generator sends to a running server
    comment      ignored

The workload that ships is made here from a seed when it is needed, with no file to go stale.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemel.config.errors import ConfigError

_PREFILL = re.compile(r"prefill(\d+)(_alt)?")


@dataclass(frozen=True, slots=True)
class Job:
    """One request: continue `prompt` (token ids) by exactly `num_output` tokens, greedily."""

    prompt: tuple[int, ...]
    num_output: int

    @property
    def num_total(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.prompt) + self.num_output


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs by benchmark. `prefill` maps a prompt length to jobs of that length, equal in size and different in content."""

    name: str
    decode: Job
    prefill: Mapping[int, tuple[Job, ...]]
    offline: tuple[Job, ...]
    shared: tuple[Job, ...]
    server: tuple[Job, ...] = ()


def load(path: Path) -> Workload:
    """Read a workload file. Raises ConfigError where the file is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"workload {path}: {error}; give a JSON file, or leave --workload out for the built-in one") from None
    if not isinstance(data, dict):
        raise ConfigError(f"workload {path}: expected a JSON object, found {type(data).__name__}")
    return _parse(data, path)


def _parse(data: Mapping[str, object], path: Path) -> Workload:
    lists = {key: _jobs(value, f"{path}: {key}") for key, value in data.items() if key != "comment"}
    known = {"decode", "offline", "shared", "server"}
    unknown = [key for key in lists if key not in known and not _PREFILL.fullmatch(key)]
    missing = [key for key in ("decode", "offline", "shared") if not lists.get(key)]
    if unknown or missing:
        raise ConfigError(
            f"workload {path}: unknown keys {unknown}, missing keys {missing}; known: {sorted(known)}, prefillN and prefillN_alt"
        )
    prefill: dict[int, list[Job]] = {}
    for key, jobs in lists.items():
        if match := _PREFILL.fullmatch(key):
            prefill.setdefault(int(match[1]), []).extend(jobs)
    for length, alike in prefill.items():
        if wrong := {len(job.prompt) for job in alike} - {length}:
            raise ConfigError(f"workload {path}: prefill{length} has prompts of {sorted(wrong)} tokens; its name says {length}")
    return Workload(
        name=path.stem,
        decode=lists["decode"][0],
        prefill={length: tuple(jobs) for length, jobs in sorted(prefill.items())},
        offline=lists["offline"],
        shared=lists["shared"],
        server=lists.get("server", ()),
    )


def dump(workload: Workload) -> str:
    """The workload as the text of a file that `load` reads."""

    def entries(jobs: Sequence[Job]) -> list[dict[str, object]]:
        return [{"prompt": list(job.prompt), "out": job.num_output} for job in jobs]

    lists = {"offline": workload.offline, "shared": workload.shared, "server": workload.server}
    lists |= {f"prefill{length}_alt": jobs for length, jobs in workload.prefill.items()}
    return json.dumps({"decode": entries([workload.decode])[0]} | {key: entries(jobs) for key, jobs in lists.items()})


def _jobs(value: object, where: str) -> tuple[Job, ...]:
    entries = value if isinstance(value, list) else [value]
    return tuple(_job(entry, f"{where}[{i}]") for i, entry in enumerate(entries))


def _job(entry: object, where: str) -> Job:
    if not isinstance(entry, dict) or set(entry) != {"prompt", "out"}:
        raise ConfigError(f"workload {where}: expected {{'prompt': [token ids], 'out': count}}")
    prompt, num_output = entry["prompt"], entry["out"]
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int and token >= 0 for token in prompt):
        raise ConfigError(f"workload {where}: prompt must be a list of token ids with at least one")
    if type(num_output) is not int or num_output < 1:
        raise ConfigError(f"workload {where}: out = {num_output!r}; it must be a count of at least 1")
    return Job(tuple(prompt), num_output)


def small(vocab_size: int, max_context: int, seed: int = 20261121) -> Workload:
    """The built-in workload: about a minute of work for a 135M-parameter model on two cores.

    Token ids are uniform over the vocabulary, its first 256 entries left out because special tokens and bytes live there. Prompts are cut
    to fit `max_context` tokens. The same arguments always give the same workload.
    """
    rng = random.Random(seed)
    first = 256 if vocab_size > 512 else 0

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(first, vocab_size) for _ in range(count))

    def job(num_prompt: int, num_output: int) -> Job:
        num_output = min(num_output, max_context // 2)
        return Job(tokens(min(num_prompt, max_context - num_output)), num_output)

    prefix = tokens(min(512, max_context // 2))
    prefills = [tuple(job(length, 1) for _ in range(4)) for length in (128, 512)]
    return Workload(
        name="small",
        decode=job(64, 64),
        prefill={len(jobs[0].prompt): jobs for jobs in prefills},
        offline=tuple(job(rng.randint(32, 256), rng.randint(16, 96)) for _ in range(24)),
        shared=tuple(Job(prefix + tokens(min(16, max_context // 4)), min(16, max_context // 4)) for _ in range(12)),
        server=tuple(job(128, 16) for _ in range(16)),
    )
