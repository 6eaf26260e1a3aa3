"""The levers of training that trade memory or time for something: each a few settings that turn it on, as `--set` takes them.

One list for whoever measures them, one after the other, against the same recipe without. What a lever needs besides, it brings along.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lever:
    """One technique.

    id         as the catalogue of levers calls it
    settings   that turn it on
    saves      memory of what, or time
    costs      what is paid for it
    exact      whether not a bit of the result changes, on one device; else sums are in another order, or numbers narrower
    default    whether it is on unless it is turned off
    needs      package or device without which it is refused
    published  what others say that it saves and costs, with the source
    """

    id: str
    settings: tuple[str, ...]
    saves: str
    costs: str
    exact: bool = False
    default: bool = False
    needs: str = ""
    published: str = ""


_BF16 = "precision.kind=bf16"
_TWICE = "every block's forward pass twice"
_WRITE_AND_WAIT = "save.asynchronous=false"
_CHEN = "5-10x less activation memory for 30% more time (arXiv 1604.06174)"
_SQRT = "activations of O(sqrt n) (arXiv 1604.06174)"
_ADAM = "Adam's 8 bytes per parameter"

TRAINING = (
    Lever("accumulate", ("batch.micro_tokens={sequence}",), "activations", "products of fewer rows"),
    Lever("checkpoint.none", ("activations={kind='none'}",), "time of norms and gates", "memory of their results", exact=True),
    Lever("checkpoint.each", ("activations={kind='recompute'}",), "activations", _TWICE, exact=True, published=_CHEN),
    Lever("checkpoint.pairs", ("activations={kind='recompute',blocks=2}",), "activations", _TWICE, exact=True),
    Lever("checkpoint.sqrt", ("activations={kind='recompute',blocks='sqrt'}",), "activations", _TWICE, exact=True, published=_SQRT),
    Lever("checkpoint.selective", ("activations={kind='selective'}",), "activations", "norms and gates twice", exact=True, default=True),
    Lever("tile.tokens", ("tiling={kind='tokens',tokens=256}",), "activations of feed-forwards", "their forward products twice"),
    Lever("tile.outputs", ("tiling={kind='outputs'}", _BF16), "copies of weights in bf16", "making them twice"),
    Lever("mixed.autocast", (_BF16,), "activations", "copies of weights; precision", published="half the activations (arXiv 1710.03740)"),
    Lever("mixed.master", (_BF16, "optim.weights=master"), "weights, gradients and activations", "precision of gradients"),
    Lever("mixed.stochastic", (_BF16, "optim.weights=stochastic"), "the same, and what bf16 lacks of weights", "noise in weights"),
    Lever("mixed.fp8", ("precision.kind=fp8",), "time of products", "precision of products", needs="torchao and a GPU that has fp8"),
    Lever("optim.bf16", ("optim.state=bf16",), "optimizer state", "noise in it", published=f"half of {_ADAM}"),
    Lever(
        *("optim.int8", ("optim.state=int8",), "optimizer state", "precision of it, and time to pack it"),
        published=f"a quarter of {_ADAM} (arXiv 2110.02861)",
    ),
    Lever(
        "optim.adafactor", ("optim.method.kind=adafactor",), "optimizer state", "another method", published="sublinear (arXiv 1804.04235)"
    ),
    Lever("offload.optimizer.cpu", ("offload.optimizer.kind=cpu",), "the device's memory", "copies", exact=True, needs="a GPU"),
    Lever("offload.parameters.cpu", ("offload.parameters.kind=cpu",), "the device's memory", "copies", exact=True, needs="a GPU"),
    Lever(
        *("offload.optimizer.disk", ("offload.optimizer.kind=disk", _WRITE_AND_WAIT), "optimizer state", "reads and writes"),
        exact=True,
        published=f"{_ADAM} (arXiv 2104.07857)",
    ),
    Lever(
        *("offload.parameters.disk", ("offload.parameters.kind=disk", _WRITE_AND_WAIT), "weights of blocks", "reading them"),
        exact=True,
        published="parameters, too (arXiv 2104.07857)",
    ),
    Lever("heap.return", ("heap=return",), "holes between tensors", "new pages for each large tensor", exact=True),
    Lever("save.waiting", (_WRITE_AND_WAIT,), "the copy of model and state while one is written", "waiting for it", exact=True),
    Lever("compile", ("compile.kind=blocks",), "time between products", "a minute of compiling, once per machine", needs="a C++ compiler"),
)


def settings(lever: Lever, sequence: int) -> tuple[str, ...]:
    """What turns a lever on in a recipe whose sequences have so many tokens."""
    return tuple(setting.replace("{sequence}", str(sequence)) for setting in lever.settings)
