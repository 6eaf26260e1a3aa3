"""Hugging Face transformers as people use it for a batch of prompts: `generate` on left-padded batches of 16, in the order of the file.

A batch runs until its longest output is complete; only the tokens that were asked for are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
import transformers as hf
from bench.peers import protocol

BATCH = 16


class Transformers:
    """A causal language model in eager mode with torch's scaled-dot-product attention (its default)."""

    def __init__(self, setup: protocol.Setup):
        torch.set_num_threads(setup.threads)
        self._model = hf.AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.precision)).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.precision = f"{setup.precision} weights, KV and arithmetic"
        self.settings: dict[str, object] = {"static batch": BATCH, "padding": "left"}
        self.versions = {"transformers": hf.__version__, "torch": torch.__version__}

    def run(self, jobs: Sequence[protocol.Job]) -> list[protocol.Span]:
        """Batch after batch; a token's time is when its step ended."""
        start_s = perf_counter()
        return [span for first in range(0, len(jobs), BATCH) for span in self._batch(jobs[first : first + BATCH], start_s)]

    def _batch(self, jobs: Sequence[protocol.Job], start_s: float) -> list[protocol.Span]:
        longest = max(len(job.prompt) for job in jobs)
        pads = [longest - len(job.prompt) for job in jobs]
        ids = torch.tensor([[0] * pad + job.prompt for pad, job in zip(pads, jobs, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(job.prompt) for pad, job in zip(pads, jobs, strict=True)])
        steps: list[float] = []

        def note(input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            steps.append(perf_counter() - start_s)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        most = max(job.num_output for job in jobs)
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=most,
                stopping_criteria=hf.StoppingCriteriaList([note]),
            )
        new = made[:, longest:].tolist()
        return [protocol.Span(steps[0], steps[job.num_output - 1], tokens[: job.num_output]) for job, tokens in zip(jobs, new, strict=True)]

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    protocol.main(Transformers)
