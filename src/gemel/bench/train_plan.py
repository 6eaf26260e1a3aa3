"""What a step of training must take at the very least: time by the roofline, memory by what has to be there at once.

Time: the products that the mathematics needs, at the machine's peak for their arithmetic, and then the optimizer, which reads and writes
everything it has at the machine's bandwidth. Norms, activations and the loss are left out, as in the plan of serving; the distance shows.

Memory: weights, gradients, the optimizer's state, what autograd keeps of each block for the backward pass, and a slice of logits beside the
gradient of the head's matrix. What a block keeps, per token: what its two norms and four products and its attention and its activation had
as inputs, as often as a thoughtful implementation has to.

D model width, N query heads, K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemel.bench.roofline import Rates
from gemel.config.compute import FP32, KeepActivations, RecomputeBlocks, SelectiveRecompute
from gemel.config.model import ModelConfig, SwiGLU
from gemel.config.optim import AdamW, OptimConfig
from gemel.config.train import TrainRecipe

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SLICE_BYTES = 2**25  # of logits: with fewer rows products are slow


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Of one step. `memory_bytes` by part."""

    step_s: float
    memory_bytes: dict[str, float]


def plan(recipe: TrainRecipe, model: ModelConfig, flops: float, rates: Rates, arithmetic: str) -> TrainPlan:
    """`flops` as `train.flops` counts them."""
    num = num_parameters(model)
    weights, state = weight_bytes(recipe.optim), state_bytes(recipe.optim)
    moved = num * (2 * (weights + state) + 4)  # read and written, and the gradient read
    step_s = flops / rates.flops_per_s[arithmetic] + moved / rates.read_bytes_per_s
    micro_tokens = recipe.batch.micro_tokens or recipe.batch.tokens
    sums = recipe.batch.micro_sequences < recipe.batch.sequences
    memory = {
        "weights": num * (4.0 if recipe.optim.weights == "fp32" else 2.0),
        "gradients": num * (4.0 if recipe.optim.weights == "fp32" or sums else 2.0),
        "state": num * (weights + state - (4.0 if recipe.optim.weights == "fp32" else 2.0)),
        "casts": num * 2.0 if recipe.optim.weights == "fp32" and not isinstance(recipe.precision, FP32) else 0.0,
        "activations": micro_tokens * activation_bytes(recipe, model),
        "head": SLICE_BYTES + 4.0 * model.vocab_size * model.width,
    }
    return TrainPlan(step_s, memory)


def num_parameters(model: ModelConfig) -> int:
    """Of matrices; norms and biases are a rounding error beside them."""
    q, kv = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    matrices = 3 if isinstance(model.ffn, SwiGLU) else 2
    block = model.width * (2 * q + 2 * kv + matrices * model.ffn_width)
    return model.num_layers * block + model.vocab_size * model.width * (1 if model.tied_head else 2)


def weight_bytes(optim: OptimConfig) -> float:
    """Per parameter, with the bits that the optimizer keeps of it."""
    return 2.0 if optim.weights == "stochastic" else 4.0


def state_bytes(optim: OptimConfig) -> float:
    """Per parameter: as many numbers as the method keeps of the size of the weights."""
    moments = 2 if isinstance(optim.method, AdamW) else int(optim.method.has_state)
    return float(moments * BYTES[optim.state])


def activation_bytes(recipe: TrainRecipe, model: ModelConfig) -> float:
    """Per token of a micro-batch, at the moment when most is held."""
    stream = 4 if recipe.optim.weights == "fp32" else 2  # of the residual stream; autocast leaves it in fp32
    product = 4 if isinstance(recipe.precision, FP32) else 2
    width, heads, kv = model.width, model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    inputs = 2 if isinstance(model.ffn, SwiGLU) else 1
    attention = product * (2 * heads + 2 * kv) + 4 * model.num_heads
    kept = 2 * stream * width + attention + product * inputs * model.ffn_width
    again = product * (2 * width + model.ffn_width)  # results of norms, and what the second product of a feed-forward reads
    match recipe.activations:
        case KeepActivations():
            return float(model.num_layers * (kept + again))
        case RecomputeBlocks():
            size = recipe.activations.size(model.num_layers)
            return float(math.ceil(model.num_layers / size) * stream * width + size * (kept + again))
        case SelectiveRecompute():
            return float(model.num_layers * kept + again)
