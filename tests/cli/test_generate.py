"""Prompts from arguments, files and standard input; what is wrong with them is said with its place."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from gemel.cli import generate
from gemel.cli import main as cli
from gemel.config.errors import ConfigError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason
from gemel.llm.offline import Completion, CompletionOutput


def jobs(prompt: str | None = None, prompts: str | None = None, chat: bool = False, **given: object) -> list[generate.Job]:
    return generate.read_jobs(argparse.Namespace(prompt=prompt, prompts=prompts, chat=chat), given)


def test_prompt_from_argument_and_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs("hello", max_tokens=3) == [generate.Job("hello", None, SamplingParams(max_tokens=3))]
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert jobs() == [generate.Job("two\nlines", None, SamplingParams())]


def test_chat_makes_a_conversation() -> None:
    assert jobs("hello", chat=True) == [generate.Job(None, [{"role": "user", "content": "hello"}], SamplingParams())]


def test_lines_of_a_file_override_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "seed": 2}, {"prompt": [5, 6]}, {"messages": [{"role": "user", "content": "b"}], "temperature": 0}]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert jobs(prompts=str(file), seed=1) == [
        generate.Job("a", None, SamplingParams(seed=2)),
        generate.Job([5, 6], None, SamplingParams(seed=1)),
        generate.Job(None, [{"role": "user", "content": "b"}], SamplingParams(seed=1, temperature=0)),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'either "prompt" or "messages"'),
        ("{}", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": [true]}', "text or a list of token ids"),
        ('{"messages": ["a"]}', "list of objects"),
        ('{"messages": []}', "list of objects"),
        ('{"prompt": "a", "max_tokns": 3}', "line 2: SamplingParams has no key 'max_tokns': did you mean 'max_tokens'"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "file").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError) as error:
        jobs(prompts=str(tmp_path / "file"))
    assert complaint in str(error.value)


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read prompts"):
        jobs(prompts=str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        jobs(prompts=str(tmp_path / "empty"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        jobs(prompts=str(tmp_path / "binary"))


def test_contradictions_and_emptiness_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not both"):
        jobs("a", prompts="-")
    with pytest.raises(ConfigError, match="not both"):
        jobs(prompts="-", chat=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match="the prompt is empty"):
        jobs()


def test_several_outputs_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tuple(CompletionOutput(text, (), (), FinishReason.STOP) for text in ("x", "y"))
    generate.print_outputs(Completion(0, (1,), outputs[:1]), headed=False)
    assert capsys.readouterr().out == "x\n"
    generate.print_outputs(Completion(1, (1,), outputs), headed=True)
    assert capsys.readouterr().out == "--- prompt 2, output 1\nx\n--- prompt 2, output 2\ny\n"


def test_refused_prompts_are_named_and_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    good = Completion(0, (1,), (CompletionOutput("x", (), (), FinishReason.STOP),))
    bad = Completion(1, (1,), (CompletionOutput("", (), (), FinishReason.ERROR, error="too long"),))
    assert generate.report_errors([good]) == 0
    assert generate.report_errors([good, bad]) == 2
    assert capsys.readouterr().err == "gemel: prompt 2: too long\n"


def test_mistake_in_sampling_does_not_wait_for_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["generate", "x", "--top-p", "2", "--model", str(tmp_path / "absent")]) == 2
    assert "SamplingParams.top_p = 2.0" in capsys.readouterr().err


@pytest.mark.model
def test_a_real_prompt_is_completed(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "The capital of France is",
        "--model",
        str(smollm2),
        "--temperature",
        "0",
        "--max-tokens",
        "2",
        "--kv-bytes",
        "512MB",
    ]
    assert cli.main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["outputs"][0]["text"].startswith(" Paris")
    assert said["outputs"][0]["finish_reason"] == "length"
