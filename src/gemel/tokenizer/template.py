"""A chat template, rendered under limits of time, memory and length.

The rendering happens in a helper process (`sandbox.py` says why). It starts with the first use, stays, and costs about
0.2 ms per rendering; when a template runs into a limit the process is gone and the next rendering starts another.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from gemel.config.errors import CheckpointError, RequestError

CPU_S = 1.0
MEMORY_BYTES = 512 * 2**20
MAX_CHARS = 8 * 2**20


class ChatTemplate:
    """One Jinja template with its helper process. Safe to call from several threads (they take turns)."""

    def __init__(self, source: str):
        self.source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the helper and compile the template now rather than on first use. Raises CheckpointError when it does not compile."""
        with self._lock:
            self._running()

    def render(self, variables: Mapping[str, object]) -> str:
        """The text for `variables` (JSON values). Raises RequestError when the template refuses them or runs into a limit."""
        line = json.dumps(dict(variables)).encode() + b"\n"
        with self._lock:
            reply = self._ask(self._running(), line)
        if "error" in reply:
            raise RequestError(f"the chat template failed on these messages: {reply['error']}", param="messages")
        return reply["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        script = str(Path(__file__).with_name("sandbox.py"))
        # -P: the folder of the script must not become a place to import from; an own process group: Ctrl-C is for the parent alone
        process = subprocess.Popen([sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        weakref.finalize(self, _end, process)
        setup = {"template": self.source, "cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES, "max_chars": MAX_CHARS}
        reply = self._ask(process, json.dumps(setup).encode() + b"\n")
        if "error" in reply:
            _end(process)
            raise CheckpointError(
                f"the chat template does not compile: {reply['error']}; correct it, or remove it and send prompts as text"
            )
        self._process = process
        return process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            reply: dict[str, str] = json.loads(answer)
            return reply
        self._process = None
        _end(process)
        if process.returncode == -signal.SIGPROF:
            return {"error": f"it ran longer than the limit of {CPU_S:g} s of CPU time and was ended"}
        return {"error": f"its process ended with code {process.returncode}"}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None and process.stdin is not None and not process.stdin.closed:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
