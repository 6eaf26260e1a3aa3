"""litgpt's GPT as `litgpt pretrain` drives it: Fabric's precision, the model compiled, its chunked cross-entropy, fused AdamW."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning as L
import torch
import transformers as hf
from bench.peers import training
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy


def config_of(given: Any) -> Config:
    """A Llama in the words of litgpt."""
    return Config(
        name="peer",
        block_size=given.max_position_embeddings,
        n_layer=given.num_hidden_layers,
        n_embd=given.hidden_size,
        n_head=given.num_attention_heads,
        n_query_groups=given.num_key_value_heads,
        vocab_size=given.vocab_size,
        padded_vocab_size=given.vocab_size,
        intermediate_size=given.intermediate_size,
        norm_class_name="RMSNorm",
        norm_eps=given.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
        rotary_percentage=1.0,
        rope_base=int(given.rope_parameters["rope_theta"]),
    )


def load(job: training.Job) -> GPT:
    """A GPT with the weights of a Hugging Face directory; its head is the embedding if theirs is."""
    given = hf.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model, weights = GPT(config_of(given.config)), {}
    copy_weights_hf_llama(model.config, defaultdict(dict), weights, given.state_dict())
    model.load_state_dict(weights)
    if given.config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def train(job: training.Job, clock: training.Clock) -> dict[str, object]:
    """As its `fit` does."""
    steps = job.steps()
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if job.precision == "bf16" else "32-true")
    model = load(job)
    model.max_seq_length = steps.shape[-1]
    compiled = fabric.setup(torch.compile(model))
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=job.lr, betas=training.BETAS, weight_decay=0.0, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    clock.start()
    for ids in steps:
        loss = chunked_cross_entropy(compiled(ids[:, :-1].contiguous()), ids[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(compiled, optimizer, max_norm=training.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(loss.item())
    return {"compiled": "whole model", "optimizer": "fused AdamW", "loss": "in chunks of 128"}


if __name__ == "__main__":
    training.main(train, "litgpt", "lightning")
