"""What the configuration of training's last stage accepts, refuses, and says."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from gemel.config.errors import ConfigError
from gemel.config.optim import WSD, AdaGC, AdamW, Group, Muon, OptimConfig, StabilityConfig

RECIPE = """
lr = 3e-4
state = "int8"
weights = "stochastic"
exempt = ["norms", "biases", "embeddings"]
method = { kind = "muon", rest = { betas = [0.9, 0.99] } }
schedule = { kind = "wsd", warmup = 100, decay = 0.2 }
clip = { kind = "adagc" }
groups = [{ match = "embed.*", lr_scale = 0.5 }]
"""


def test_reads_a_recipe_and_survives_saving() -> None:
    config = OptimConfig.parse(tomllib.loads(RECIPE))
    assert config.method == Muon(rest=AdamW(betas=(0.9, 0.99)))
    assert config.schedule == WSD(warmup=100, decay=0.2)
    assert config.clip == AdaGC()
    assert config.groups == (Group(match="embed.*", lr_scale=0.5),)
    assert OptimConfig.parse(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": {"kind": "linear", "warmup": 100.0}}, "for 100 steps write 100"),
        ({"schedule": {"kind": "linear", "warmup": -1}}, "negative"),
        ({"schedule": {"kind": "linear", "decay": 0.1}}, "decay"),
        ({"method": {"kind": "lion", "eps": 1e-8}}, "eps"),
        ({"method": {"kind": "sgd", "momentum": 0.0, "nesterov": True}}, "nesterov = true needs momentum"),
        ({"method": {"kind": "adamw", "betas": [0.9, 1.0]}}, "less than 1"),
        ({"exempt": ["norm"]}, "norms"),
        ({"lr": 0.0}, "greater than 0"),
    ],
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig.parse(values)


@pytest.mark.parametrize(
    ("method", "way_out"),
    [
        ({"kind": "sgd", "momentum": 0.0}, {"kind": "sgd", "momentum": 0.9}),
        ({"kind": "adafactor"}, {"kind": "adafactor", "beta1": 0.9}),
    ],
)
@pytest.mark.parametrize("setting", [{"state": "int8"}, {"state": "bf16"}])
def test_settings_of_a_state_that_is_not_kept_are_refused(method: dict[str, Any], way_out: dict[str, Any], setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no effect"):
        OptimConfig.parse({"method": method, **setting})
    OptimConfig.parse({"method": way_out, **setting})


def test_a_window_that_never_fills_is_refused() -> None:
    with pytest.raises(ConfigError, match="least_window = 32 is more than window = 16"):
        StabilityConfig.parse({"window": 16})
    StabilityConfig.parse({"window": 16, "least_window": 16})
