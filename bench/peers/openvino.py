"""OpenVINO GenAI's continuous batching pipeline, on a model that optimum-intel exported."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from bench.peers import protocol

KV_GB = 2
# 16 bit weights get 16 bit keys and values; low-bit ones what the plugin takes by itself, which is 8 bits.
KV = {"fp32": "f32", "fp16": "f16", "int8": "u8", "int4": "u8"}


class OpenVINO:
    """`precision` is that of the exported weights; what the CPU plugin computes in is asked of it once the model is loaded."""

    def __init__(self, setup: protocol.Setup):
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = 64
        kv = KV[setup.precision]
        properties = {"INFERENCE_NUM_THREADS": setup.threads, "KV_CACHE_PRECISION": kv}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(setup.model), scheduler, "CPU", properties)
        self._next = 0
        hint = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = f"{setup.precision} weights, {kv} KV, {hint} arithmetic"
        weights = round((setup.model / "openvino_model.bin").stat().st_size / 1e6)
        self.settings: dict[str, object] = {
            "weights MB": weights,
            "KV pool GB": KV_GB,
            "max_num_seqs": scheduler.max_num_seqs,
            "prefix caching": True,
        }
        self.versions = {"openvino-genai": openvino_genai.__version__, "openvino": openvino.__version__}

    def run(self, jobs: Sequence[protocol.Job]) -> list[protocol.Span]:
        """Add every job, then step until all are done, reading each handle after each step."""
        start_s = perf_counter()
        handles = [self._add(job) for job in jobs]
        tokens: list[list[int]] = [[] for _ in jobs]
        first_s, last_s = [0.0] * len(jobs), [0.0] * len(jobs)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now_s = perf_counter() - start_s
            for number, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        tokens[number] += output.generated_ids
                    last_s[number] = now_s
                    first_s[number] = first_s[number] or now_s
        return [protocol.Span(*times) for times in zip(first_s, last_s, tokens, strict=True)]

    def _add(self, job: protocol.Job) -> object:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = job.num_output
        config.min_new_tokens = job.num_output
        config.ignore_eos = True
        config.do_sample = False
        self._next += 1
        ids = self._openvino.Tensor(self._numpy.array([job.prompt], dtype=self._numpy.int64))
        return self._pipeline.add_request(self._next, ids, config)

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    protocol.main(OpenVINO)
