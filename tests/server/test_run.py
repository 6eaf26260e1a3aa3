"""Signals, in a process of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import MODEL, user

ROOT = Path(__file__).parents[2]
PROGRAM = f"""
import sys
from gemel.config.server import ServerConfig
from gemel.server.app import create_app
from gemel.server.run import run
from tests.server.fake_llm import FakeLLM
config = ServerConfig(port=int(sys.argv[1]), drain_s=float(sys.argv[2]))
run(create_app(FakeLLM(reply="x" * int(sys.argv[3]), delay_s=0.02, max_context=10**6), config, {MODEL!r}), config)
print("clean end", flush=True)
"""


@contextmanager
def process(drain_s: float, num_tokens: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, str(port), str(drain_s), str(num_tokens)]
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                break
            except httpx.TransportError:
                assert child.poll() is None and time.monotonic() < deadline, child.communicate()
                time.sleep(0.05)
        yield child, f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_requests_finish_and_takes_no_new_ones(sig: signal.Signals) -> None:
    with process(drain_s=30, num_tokens=40) as (child, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=user(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            child.send_signal(sig)
            time.sleep(0.3)  # uvicorn looks for signals ten times a second
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            text = "\n".join(lines)
        assert text.count('"content":"x"') == 40 and "[DONE]" in text
        output, _ = child.communicate(timeout=30)
    assert child.returncode == 0 and "clean end" in output and "Traceback" not in output


def test_the_second_signal_ends_at_once() -> None:
    with (
        process(drain_s=600, num_tokens=100_000) as (child, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=user(stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=10)
    assert child.returncode == 128 + signal.SIGINT and "Traceback" not in output


def test_the_drain_ends_in_time() -> None:
    with process(drain_s=0.5, num_tokens=100_000) as (child, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=user(stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            assert "shutting down" in "\n".join(lines)
        output, _ = child.communicate(timeout=30)
    assert child.returncode == 0 and "Traceback" not in output
