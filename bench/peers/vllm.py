"""vLLM's CPU build through its Python API: the engine is stepped in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from bench.peers import protocol

KV_GIB = 2
MAX_CONTEXT = 4096


class VLLM:
    """Eager mode, which starts without compiling. One process, so that its memory and start are counted as those of the others."""

    def __init__(self, setup: protocol.Setup):
        # Read when vllm is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_GIB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[: setup.threads]))
        import torch
        import vllm

        self._sampling = vllm.SamplingParams
        dtype = "bfloat16" if setup.precision == "int8" else setup.precision  # of everything but W8A8's matrices
        model = str(Path(setup.model))
        self._engine = vllm.LLM(model, dtype=dtype, max_model_len=MAX_CONTEXT, enforce_eager=True, skip_tokenizer_init=True).llm_engine
        self._calls = 0
        self.precision = f"{setup.precision} weights, {dtype} KV"
        weights = round(sum(file.stat().st_size for file in setup.model.glob("*.safetensors")) / 1e6)
        self.settings: dict[str, object] = {
            "weights MB": weights,
            "enforce_eager": True,
            "KV pool GiB": KV_GIB,
            "max_model_len": MAX_CONTEXT,
        }
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}

    def run(self, jobs: Sequence[protocol.Job]) -> list[protocol.Span]:
        """Add every job, then step until all are done."""
        self._calls += 1
        tokens: dict[str, list[int]] = {}
        first_s: dict[str, float] = {}
        last_s: dict[str, float] = {}
        names = [f"{self._calls}-{number}" for number in range(len(jobs))]
        start_s = perf_counter()
        for name, job in zip(names, jobs, strict=True):
            params = self._sampling(temperature=0.0, ignore_eos=True, max_tokens=job.num_output, detokenize=False)
            self._engine.add_request(name, {"prompt_token_ids": job.prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                name, got = output.request_id, list(output.outputs[0].token_ids)
                if len(got) > len(tokens.get(name, ())):
                    last_s[name] = perf_counter() - start_s
                    first_s.setdefault(name, last_s[name])
                    tokens[name] = got
        return [protocol.Span(first_s[name], last_s[name], tokens[name]) for name in names]

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    protocol.main(VLLM)
