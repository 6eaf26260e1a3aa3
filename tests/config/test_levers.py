"""The list of levers against the recipe: every setting is one, and changes something."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from gemel.config import levers
from gemel.config import train as config
from gemel.config.levers import TRAINING, Lever
from tests.config.test_train import LEAST


@pytest.mark.parametrize("lever", TRAINING, ids=lambda lever: lever.id)
def test_levers_are_settings_of_a_recipe(lever: Lever, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(tomli_w.dumps(LEAST))
    plain = config.load(tmp_path / "r.toml")
    recipe = config.load(tmp_path / "r.toml", levers.settings(lever, plain.batch.sequence))
    assert (recipe == plain) == lever.default
    assert not lever.exact or recipe.what() == plain.what()


def test_names_are_names() -> None:
    assert len({lever.id for lever in TRAINING}) == len(TRAINING)
