"""The loop that everybody writes, at its best: a transformers model under torch.compile, autocast, fused AdamW."""

from __future__ import annotations

import torch
import transformers as hf
from bench.peers import training


def train(job: training.Job, clock: training.Clock) -> dict[str, object]:
    """One batch after another."""
    model = hf.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, betas=training.BETAS, weight_decay=0.0, fused=True)
    clock.start()
    for ids in job.steps():
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(loss.item())
    return {"compiled": "whole model", "optimizer": "fused AdamW"}


if __name__ == "__main__":
    training.main(train, "transformers")
