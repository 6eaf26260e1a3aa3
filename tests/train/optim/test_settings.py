"""Who gets which rate, decay and L1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemel.config.errors import ConfigError
from gemel.config.optim import SGD, AdamW, Group, Muon, OptimConfig
from gemel.train.optim import build
from gemel.train.optim.settings import Settings, assign
from tests.tiny import build as tiny


def test_kinds_of_a_whole_model_are_known_by_name() -> None:
    """Of a model with biases, learned positions and layer norms, the matrices of the blocks are what is left."""
    names = [name for name, _ in tiny("learned").model.named_parameters()]
    config = OptimConfig(weight_decay=0.5, l1=0.25, exempt=("norms", "biases", "embeddings"))
    decayed = {name for name, one in assign(config, names).items() if one.weight_decay}
    assert decayed == {name for name in names if name.startswith("layers.") and name.endswith("weight") and "norm" not in name}
    assert all(one.l1 == (0.25 if name in decayed else 0.0) for name, one in assign(config, names).items())


@pytest.mark.parametrize(
    ("exempt", "decayed"),
    [
        (("norms",), {"embed.weight", "layers.0.attn.q.bias", "layers.0.attn.q.weight"}),
        (("biases",), {"embed.weight", "layers.0.attn.q.weight", "layers.0.attn.q_norm.weight", "norm.weight"}),
        ((), {"embed.weight", "layers.0.attn.q.bias", "layers.0.attn.q.weight", "layers.0.attn.q_norm.weight", "norm.weight"}),
    ],
)
def test_each_kind_is_exempt_by_itself(exempt: tuple[str, ...], decayed: set[str]) -> None:
    names = ["embed.weight", "layers.0.attn.q.bias", "layers.0.attn.q.weight", "layers.0.attn.q_norm.weight", "norm.weight"]
    found = assign(OptimConfig.parse({"exempt": exempt}), names)
    assert {name for name, one in found.items() if one.weight_decay} == decayed


def test_the_first_group_that_matches_decides_and_overrides_exemptions() -> None:
    groups = (Group(match="*.q_norm.*", weight_decay=0.3), Group(match="layers.*", lr_scale=2.0), Group(match="*", l1=0.7))
    names = ["layers.0.q_norm.weight", "layers.0.q.weight", "layers.0.q.bias", "head.weight"]
    assert assign(OptimConfig(weight_decay=0.1, groups=groups), names) == {
        "layers.0.q_norm.weight": Settings(1.0, 0.3, 0.0),
        "layers.0.q.weight": Settings(2.0, 0.1, 0.0),
        "layers.0.q.bias": Settings(2.0, 0.0, 0.0),
        "head.weight": Settings(1.0, 0.1, 0.7),
    }


def test_groups_that_decide_nothing_are_refused() -> None:
    names = ["layers.0.q.weight", "layers.1.q.weight", "head.weight"]
    with pytest.raises(ConfigError, match=r"named like 'embed\.\*'; there are: head\.weight, layers\.\*\.q\.weight$"):
        assign(OptimConfig(groups=(Group(match="embed.*"),)), names)
    with pytest.raises(ConfigError, match="earlier groups take all"):
        assign(OptimConfig(groups=(Group(match="*"), Group(match="head.*"))), names)
    assign(OptimConfig(groups=(Group(match="head.*"), Group(match="*"))), names)


def test_rates_and_decay_reach_the_weights() -> None:
    """Plain descent with a gradient of 1 moves by the rate; the group's rate scales its decay too."""
    groups = (Group(match="a", lr_scale=3.0, weight_decay=0.0), Group(match="b", lr_scale=0.0))
    w = {name: nn.Parameter(torch.ones(1)) for name in "abc"}
    optimizer = build(OptimConfig(method=SGD(momentum=0.0), weight_decay=0.5, groups=groups), w.items())
    for parameter in w.values():
        parameter.grad = torch.ones(1)
    optimizer.step(0.1)
    assert [w[name].item() for name in "abc"] == pytest.approx([1 - 0.3, 1.0, 1 - 0.05 - 0.1])


def test_what_muon_leaves_to_adamw_has_a_rate_of_its_own() -> None:
    w = {name: nn.Parameter(torch.ones(2, 2)) for name in ("layers.0.w", "head.w")}
    w["layers.0.b"] = nn.Parameter(torch.ones(2))
    optimizer = build(OptimConfig(method=Muon(rest=AdamW(), rest_lr_scale=0.1), weight_decay=0.0), w.items())
    for parameter in w.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1)
    assert w["head.w"].flatten().tolist() == pytest.approx([0.99] * 4) and w["layers.0.b"].tolist() == pytest.approx([0.99] * 2)
    assert {name.split(".")[-1] for name in optimizer.state_dict() if name.startswith("layers.0.w")} == {"momentum", "step"}
