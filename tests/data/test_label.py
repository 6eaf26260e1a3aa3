"""Labels from a server of our own: what is sent, what is read from answers, failures, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gemel.config.data.rules import LabelConfig
from gemel.config.errors import CheckpointError, ConfigError
from gemel.data import label
from gemel.data.label import Answer, Endpoint, prompt_for, read_labelled, read_rows, read_score, read_texts, write


class Server(ThreadingHTTPServer):
    """Scores a text by how many times it says `good`; `bad luck` and `down` are errors of the server, `odd` is no answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.busy = 0  # so many requests are answered with 429 first


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers["Authorization"])
        prompt = body["messages"][0]["content"]
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"error": "no such path"})
        if self.server.busy > 0:
            self.server.busy -= 1
            return self.answer(429, {"error": "busy"})
        if "bad luck" in prompt:
            return self.answer(400, {"error": "refused"})
        if "odd" in prompt:
            return self.answer(200, {"choices": [{"message": {"content": "I would rather not say."}}]})
        return self.answer(200, {"choices": [{"message": {"content": f"It is so.\nScore: {prompt.count('good')}"}}]})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing: pytest shows what fails."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(label, "RETRY_AFTER_S", (0.0, 0.0))
    with Server() as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def config(server: Server, **values: Any) -> LabelConfig:
    defaults = {"endpoint": f"http://127.0.0.1:{server.server_port}/v1", "model": "judge", "prompt": "Rate 0 to {most}: {text}", "batch": 3}
    return LabelConfig.parse(defaults | values)


TEXTS = [("a", "good good"), ("b", "nothing"), ("c", "bad luck"), ("d", "odd"), ("e", "good good good"), ("f", "good " * 9)]


def test_every_text_gets_a_label_or_a_reason(server, tmp_path):
    file = tmp_path / "labels.jsonl"
    settings = config(server)
    counts = write(TEXTS, Endpoint(settings, "secret"), settings, file)
    rows = list(read_rows(file))
    assert [(row["id"], row["score"], row["error"]) for row in rows] == [
        ("a", 2, ""),
        ("b", 0, ""),
        ("c", None, "label.failed"),
        ("d", None, "label.unreadable"),
        ("e", 3, ""),
        ("f", None, "label.unreadable"),  # 9 is not on the scale
    ]
    assert counts == {"label.done": 3, "label.failed": 1, "label.unreadable": 2}
    assert "HTTP 400" in rows[2]["answer"] and "rather not" in rows[3]["answer"]
    assert set(server.keys) == {"Bearer secret"}
    assert {(body["model"], body["temperature"]) for body in server.seen} == {("judge", 0)}
    assert "Rate 0 to 5: good good" in [body["messages"][0]["content"] for body in server.seen]


def test_a_run_goes_on_where_it_ended_and_asks_again_what_failed(server, tmp_path):
    file = tmp_path / "labels.jsonl"
    settings = config(server)
    write(TEXTS[:4], Endpoint(settings), settings, file)
    with file.open("a") as out:
        out.write('{"id": "e", "text": "half a li')
    assert [row["id"] for row in read_rows(file)] == ["a", "b", "c", "d"]
    server.seen.clear()
    counts = write(TEXTS[:5], Endpoint(settings), settings, file)
    assert len(server.seen) == 3
    assert counts == {"label.there_already": 2, "label.done": 1, "label.failed": 1, "label.unreadable": 1}
    assert [(one.text, one.good) for one in read_labelled([file], 2.5)] == [
        ("good good", False),
        ("nothing", False),
        ("good good good", True),
    ]


def test_a_busy_server_is_asked_again(server):
    server.busy = 2
    assert Endpoint(config(server))(["good"]) == [Answer("It is so.\nScore: 1")]
    assert len(server.seen) == 3


def test_a_server_that_never_answers_ends_the_run(server, tmp_path):
    server.busy = 1000
    settings = config(server)
    with pytest.raises(ConfigError, match="HTTP 429"):
        write(TEXTS, Endpoint(settings), settings, tmp_path / "labels.jsonl")
    with pytest.raises(ConfigError, match="check the endpoint"):
        Endpoint(config(server, endpoint=f"http://127.0.0.1:{server.server_port}/v2"))(["good"])
    with pytest.raises(ConfigError, match="refused"):
        Endpoint(LabelConfig(endpoint="http://127.0.0.1:9/v1"))(["good"])


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Clear. Score: 4", 4),
        ("1 point for facts.\n**Score: 3**", 3),
        ("Score: 2/5", 2),
        ("Total: 4 out of 5", 4),
        ("两句话。评分：5", 5),
        ("3", 3),
        ("Score: 1, or rather score: 2.", 2),
        ("Score: 7", None),
        ("It scores 2.5", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_scores_in_answers(answer, score):
    assert read_score(answer, 5) == score


def test_prompts_hold_the_beginning_of_the_text_as_it_is():
    assert prompt_for("{most}{x}defgh", LabelConfig(prompt="<{text}> of {most}", max_characters=9)) == "<{most}{x}> of 5"
    with pytest.raises(ConfigError, match=r"\{text\}"):
        LabelConfig.parse({"prompt": "Rate this"})


def test_texts_from_files(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": "x", "body": "one"}\n{"body": "two"}\n')
    (tmp_path / "b.txt").write_text("three\nlines")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert [text for _, text in read_texts(files, "body")] == ["one", "two", "three\nlines"]
    with pytest.raises(ConfigError, match="--field"):
        list(read_texts(files, "text"))
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n{}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        list(read_rows(tmp_path / "bad.jsonl"))


def test_labels_that_are_no_labels_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": "high"}\n')
    with pytest.raises(ConfigError, match="number"):
        list(read_labelled([tmp_path / "a.jsonl"], 3))
    (tmp_path / "b.jsonl").write_text('{"text": "x", "ok": true}\n{"text": "y", "ok": false}\n')
    assert [one.good for one in read_labelled([tmp_path / "b.jsonl"], 3, "ok")] == [True, False]
