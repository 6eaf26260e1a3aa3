"""Gemel itself, through the engine that serves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from time import perf_counter

import torch
from bench.peers import protocol, serving

import gemel
from gemel.bench import machine, suite, workload
from gemel.bench.subject import Subject
from gemel.config.engine import EngineConfig
from gemel.config.sampling import SamplingParams
from gemel.engine.request import Request


class Gemel:
    """One engine with its own defaults but for what `serving.GEMEL` says of the precision."""

    def __init__(self, setup: protocol.Setup):
        config = EngineConfig.parse({"device": "cpu", "threads": setup.threads, **serving.GEMEL[setup.precision]})
        self._subject = Subject.open(setup.model, config)
        self._names = itertools.count()
        self._setup = setup
        self.precision = f"{setup.precision} weights, " + ", ".join(
            f"{each.name} {each.value}" for each in self._subject.engine.derived if each.name in ("dtype", "kernels", "KV cache")
        )
        self.settings: dict[str, object] = {
            "weights MB": round(self._subject.storage.weight_bytes / 1e6),
            "max_running": config.max_running,
            "max_step_tokens": config.max_step_tokens,
        }
        self.versions = {"gemel": gemel.__version__, "torch": torch.__version__}

    def run(self, jobs: Sequence[protocol.Job]) -> list[protocol.Span]:
        """Each call has a salt of its own, so that only jobs of one call share prefixes."""
        engine, salt = self._subject.engine, str(next(self._names))
        tokens: list[list[int]] = [[] for _ in jobs]
        first_s, last_s = [0.0] * len(jobs), [0.0] * len(jobs)
        start_s = perf_counter()
        for number, job in enumerate(jobs):
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=job.num_output)
            engine.add(Request(f"{salt}-{number}", tuple(job.prompt), params, salt=salt))
        while engine.has_work:
            for output in engine.step():
                number = int(output.request_id.rpartition("-")[2])
                last_s[number] = perf_counter() - start_s
                first_s[number] = first_s[number] or last_s[number]
                tokens[number] += output.tokens
        return [protocol.Span(*times) for times in zip(first_s, last_s, tokens, strict=True)]

    def plan(self, work: Sequence[str]) -> dict[str, object]:
        """The roofline of this machine, measured now, through our scheduler: no engine of this precision can do much better."""
        rates = machine.rates(self._subject.device, self._subject.storage.arithmetics)
        jobs = workload.load(self._setup.workload)
        figures = {name: suite.planned(self._subject, name, jobs, rates) for name in work}
        return {"figures": figures, "read_bytes_per_s": rates.read_bytes_per_s, "flops_per_s": dict(rates.flops_per_s)}

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    protocol.main(Gemel)
