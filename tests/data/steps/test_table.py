from __future__ import annotations

from importlib import import_module
from typing import get_args

from gemel.config.data.pipeline import CustomConfig, StepConfig
from gemel.data.build import CORPUS_METHODS, STEPS


def test_every_step_of_a_recipe_has_a_class_that_is_a_step() -> None:
    members = set(get_args(get_args(StepConfig)[0]))
    assert members - {CustomConfig} == set(STEPS)
    for config, target in STEPS.items():
        module, _, name = target.partition(":")
        made = getattr(import_module(f"gemel.data.steps.{module}"), name)
        assert "__call__" in vars(made) or set(CORPUS_METHODS) <= set(vars(made)), config
