"""One step: its loss and gradients against transformers, and everything that must not change them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemel.config.train import TrainRecipe
from gemel.model.build import LoadedModel, load
from gemel.ops import train
from gemel.ops.cpu import training
from gemel.train.batch import Batch
from gemel.train.loader import Step
from gemel.train.trainer import Trainer
from tests import tiny
from tests.model.reference import FAMILIES, save_reference
from tests.tolerance import assert_close
from tests.train import runs

DOCUMENTS = tiny.documents(9, 4, 17, 2, 11, 7, 5, 13)


def trainer(folder: Path, kind: str = "gqa", loaded: LoadedModel | None = None, **changes: Any) -> Trainer:
    found = loaded or tiny.build(kind)
    found.model.requires_grad_(True)
    if changes.get("optim__weights", "fp32") != "fp32":
        for parameter in found.model.parameters():
            parameter.data = parameter.data.bfloat16()
    return Trainer(runs.recipe(folder, **changes), found, torch.device("cpu"))


def step(*batches: Batch) -> Step:
    return Step(batches, {}, sum(batch.num_tokens for batch in batches))


def gradients(made: Trainer, *batches: Batch) -> tuple[float, dict[str, Tensor]]:
    """Of a step, before clipping."""
    loss, _ = made._gradients(batches, sum(batch.weight for batch in batches))
    return loss, {name: p.grad.clone() for name, p in made.loaded.model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], row: str) -> None:
    assert got.keys() == want.keys()
    scale = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in got.items():  # relative to the largest of all: a sum that cancels has no scale of its own
        assert_close(torch.cat([gradient.flatten(), scale[None]]), torch.cat([want[name].flatten(), scale[None]]), row)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Documents of unequal length, some tokens not trained: sum over all trained tokens by their number."""
    model = save_reference(tmp_path / "model", family)
    trained = [[(i + j) % 3 != 0 for j in range(len(d) - 1)] for i, d in enumerate(DOCUMENTS)]
    total = sum(map(sum, trained))
    want = 0.0
    for document, flags in zip(DOCUMENTS, trained, strict=True):
        labels = [-100, *(token if flag else -100 for token, flag in zip(document[1:], flags, strict=True))]
        if any(flags):
            loss = model(torch.tensor([document]), labels=torch.tensor([labels])).loss * sum(flags) / total
            loss.backward()
            want += loss.item()
    made = trainer(tmp_path, loaded=load(tmp_path / "model"))
    got, ours = gradients(made, runs.batch(*DOCUMENTS, trained=trained))
    assert_close(torch.tensor(got), torch.tensor(want), "fp32_reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    assert_same_gradients(ours, dict(load(tmp_path / "gradients").model.named_parameters()), "fp32_reference")


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_eight_micro_batches_are_one_batch(kind: str, tmp_path: Path) -> None:
    """Their lengths and numbers of trained tokens differ, so a mean of means would be another number."""
    trained = [[j % (i + 1) == 0 for j in range(len(d) - 1)] for i, d in enumerate(DOCUMENTS)]
    whole, whole_grads = gradients(trainer(tmp_path, kind), runs.batch(*DOCUMENTS, trained=trained))
    parts = [runs.batch(document, trained=[flags]) for document, flags in zip(DOCUMENTS, trained, strict=True)]
    summed, summed_grads = gradients(trainer(tmp_path, kind), *parts)
    assert_close(torch.tensor(summed), torch.tensor(whole), "fp32_cut")
    assert_same_gradients(summed_grads, whole_grads, "fp32_cut")
    means = [gradients(trainer(tmp_path, kind), part)[0] for part in parts]
    assert abs(sum(means) / len(means) - whole) > 1e-3 * whole


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_packed_documents_are_separate_documents(kind: str, tmp_path: Path) -> None:
    """Not only the loss: what a document does to the weights does not depend on who lies beside it."""
    packed, packed_grads = gradients(trainer(tmp_path, kind), runs.batch(*DOCUMENTS[:3]))
    reversed_, reversed_grads = gradients(trainer(tmp_path, kind), runs.batch(*reversed(DOCUMENTS[:3])))
    assert_close(torch.tensor(packed), torch.tensor(reversed_), "fp32_cut")
    assert_same_gradients(packed_grads, reversed_grads, "fp32_cut")
    alone = [gradients(trainer(tmp_path, kind), runs.batch(document)) for document in DOCUMENTS[:3]]
    weights = [len(document) - 1 for document in DOCUMENTS[:3]]
    shares = [weight / sum(weights) for weight in weights]
    assert_close(torch.tensor(packed), torch.tensor(sum(s * loss for s, (loss, _) in zip(shares, alone, strict=True))), "fp32_cut")
    summed = {name: sum(s * g[name] for s, (_, g) in zip(shares, alone, strict=True)) for name in packed_grads}
    assert_same_gradients(packed_grads, summed, "fp32_cut")


@pytest.mark.parametrize("kind", ["gqa", "window", "learned"])
@pytest.mark.parametrize(
    "activations",
    [{"kind": "recompute"}, {"kind": "recompute", "blocks": 2}, {"kind": "recompute", "blocks": 3}, {"kind": "selective"}],
    ids=["each", "pairs", "all", "selective"],
)
def test_recomputed_gradients_are_the_same_bits(activations: dict[str, Any], kind: str, tmp_path: Path) -> None:
    loaded = tiny.build(kind, num_layers=3, windows=(7, None, 5) if kind == "window" else ())
    plain = gradients(trainer(tmp_path, loaded=copy.deepcopy(loaded)), runs.batch(*DOCUMENTS))
    made = trainer(tmp_path, loaded=loaded, activations=activations)
    assert [name for name, _ in made.loaded.model.named_parameters()] == [
        name for name, _ in tiny.build(kind, num_layers=3).model.named_parameters()
    ]
    again = gradients(made, runs.batch(*DOCUMENTS))
    assert again[0] == plain[0]
    assert_same_gradients(again[1], plain[1], "exact")


class Kept:
    """Bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


def test_recomputing_keeps_less(tmp_path: Path) -> None:
    """More groups hold more inputs; one group of all blocks holds one."""
    held = []
    for activations in ({"kind": "none"}, {"kind": "recompute"}, {"kind": "recompute", "blocks": 4}):
        made, kept = trainer(tmp_path, loaded=tiny.build(num_layers=4), activations=activations), Kept()
        weights = {p.untyped_storage().data_ptr() for p in made.loaded.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            made._loss(runs.batch(*DOCUMENTS), 1.0, 0.0)
        held.append(sum(size for where, size in kept.storages.items() if where not in weights))
    assert held[0] > 2 * held[1] > 2 * held[2]


class Calls(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def test_selective_recomputes_only_what_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch: a model with GELU."""
    aten = torch.ops.aten
    monkeypatch.setattr(training, "kernels", lambda: None)
    counts = {}
    for kind in ("none", "selective", "recompute"):
        made = trainer(tmp_path, loaded=tiny.build("learned"), activations={"kind": kind})
        with Calls() as calls:
            gradients(made, runs.batch(*DOCUMENTS))
        counts[kind] = Counter({operation: count for operation, count in calls.counts.items() if operation is not aten.detach.default})
    extra = {kind: found - counts["none"] for kind, found in counts.items()}
    cheap = {aten.gelu.default: 2}
    assert extra["selective"] == cheap
    assert cheap.items() <= extra["recompute"].items()
    assert extra["recompute"][aten.addmm.default] == 2 * 3  # nobody needs the result of a block's last


def test_selective_recomputes_only_what_is_cheap_natively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if training.kernels() is None:
        pytest.skip("the kernels are not compiled")
    monkeypatch.setattr(train, "products_are_native", lambda _: True)
    call, counts = training.Kernels._call, {}
    for kind in ("none", "selective", "recompute"):
        calls: Counter[str] = Counter()
        monkeypatch.setattr(training.Kernels, "_call", lambda self, name, *args, to=calls: (to.update([name]), call(self, name, *args))[1])
        gradients(trainer(tmp_path, activations={"kind": kind}), runs.batch(*DOCUMENTS))
        counts[kind] = calls
    layers, products = 2, 4
    extra = {kind: found - counts["none"] for kind, found in counts.items()}
    cheap = {"gemel_rms_norm_forward": 2 * layers, "gemel_swiglu_run": layers}
    rest = {"gemel_rope_turn": layers, "gemel_gemm": layers * products, "gemel_packed_attention_forward": layers}
    assert extra["selective"] == cheap
    assert extra["recompute"] == cheap | rest


def test_selective_keeps_less(tmp_path: Path) -> None:
    """Bytes that a forward pass leaves behind for the backward pass, whoever holds them: allocated and not freed."""
    held = {}
    for kind in ("none", "selective", "recompute"):
        made = trainer(tmp_path, loaded=tiny.build(num_layers=4), activations={"kind": kind})
        made._loss(runs.batch(*DOCUMENTS), 1.0, 0.0)
        with torch.profiler.profile(profile_memory=True) as profiler:
            loss, _ = made._loss(runs.batch(*DOCUMENTS), 1.0, 0.0)
        held[kind] = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        del loss
    assert held["none"] > 1.25 * held["selective"] > 1.25 * held["recompute"] > 0


def test_a_step_moves_the_weights_as_the_optimizer_says(tmp_path: Path) -> None:
    """Against torch.optim on the same gradients, with clipping."""
    made, other = trainer(tmp_path), tiny.build()
    other.model.requires_grad_(True)
    _, grads = gradients(trainer(tmp_path), runs.batch(*DOCUMENTS))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    parameters = dict(other.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = grads[name] * min(1.0, 1.0 / norm)
    groups = [
        {"params": [p for n, p in parameters.items() if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in parameters.items() if "norm" in n], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()
    report = made.learn(step(runs.batch(*DOCUMENTS)))
    assert (report.action, report.step, report.num_trained) == ("ok", 1, sum(map(len, DOCUMENTS)) - len(DOCUMENTS))
    assert_close(torch.tensor(report.norm), torch.tensor(norm), "fp32_reorder")
    for name, parameter in made.loaded.model.named_parameters():
        assert parameter.grad is None
        assert_close(parameter, parameters[name], "fp32_reference")


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.learn(step(runs.batch(*DOCUMENTS)))
    before = copy.deepcopy(made.loaded.model.state_dict())
    bad = runs.batch(*DOCUMENTS)
    bad.weights_T[3] = math.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "weight", 10.0)
        report = made.learn(step(bad))
    assert report.action == "skip" and "nan" in report.reason and report.step == made.step == 2
    assert all(torch.equal(x, before[name]) for name, x in made.loaded.model.state_dict().items())
    assert made.learn(step(runs.batch(*DOCUMENTS))).action == "ok"
    assert not torch.equal(made.loaded.model.embed.weight, before["embed.weight"])


def test_fp16_scales_the_loss_until_gradients_fit(tmp_path: Path) -> None:
    fp16 = {"kind": "fp16", "initial_scale": 2.0**40, "growth_steps": 2}
    made = trainer(tmp_path, precision=fp16, steps=100)
    before = copy.deepcopy(made.loaded.model.state_dict())
    reports = [made.learn(step(runs.batch(*DOCUMENTS)))]
    assert reports[0].action == "overflow"
    assert all(torch.equal(x, before[name]) for name, x in made.loaded.model.state_dict().items())
    while reports[-1].action == "overflow":
        reports.append(made.learn(step(runs.batch(*DOCUMENTS))))
    assert made._numbers.scale == 2.0 ** (40 - len(reports) + 1)
    exact, _ = gradients(trainer(tmp_path), runs.batch(*DOCUMENTS))
    assert_close(torch.tensor(reports[-1].loss), torch.tensor(exact), "bf16_reorder")
    made.learn(step(runs.batch(*DOCUMENTS)))
    assert made._numbers.scale == 2.0 ** (40 - len(reports) + 2)
    assert made._detector.num_skipped == 0  # an overflow is no accident


@pytest.mark.parametrize("changes", [{"precision": {"kind": "bf16"}}, {"precision": {"kind": "bf16"}, "optim__weights": "master"}])
def test_bf16_gradients_are_near_and_add_up_in_fp32(changes: dict[str, Any], tmp_path: Path) -> None:
    _, want = gradients(trainer(tmp_path), runs.batch(*DOCUMENTS))
    _, got = gradients(trainer(tmp_path, **changes), *(runs.batch(document) for document in DOCUMENTS))
    assert {g.dtype for g in got.values()} == {torch.float32}
    assert_same_gradients(got, want, "bf16_gradients")


def test_validation_is_the_loss_without_what_is_beside_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, loss__z_loss=0.1, loss__label_smoothing=0.1)
    plain, _ = gradients(trainer(tmp_path), runs.batch(*DOCUMENTS))
    loss, weight = made.validate([runs.batch(document) for document in DOCUMENTS])
    assert_close(torch.tensor(loss / weight), torch.tensor(plain), "fp32_reorder")
    report = made.learn(step(runs.batch(*DOCUMENTS)))
    assert report.z > 0 and report.loss != pytest.approx(plain)


def test_narrow_weights_need_narrow_products(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs precision.kind = 'bf16'"):
        runs.recipe(tmp_path, optim__weights="master")
    assert isinstance(runs.recipe(tmp_path, optim__weights="master", precision={"kind": "bf16"}), TrainRecipe)
