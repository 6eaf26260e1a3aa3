"""Compiled blocks: the same numbers within rounding, compiled once for all blocks and batches, and found again in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemel.config.env import Env
from gemel.config.errors import ConfigError, UnsupportedError
from gemel.train import compile as compiling
from tests import tiny
from tests.tolerance import assert_close
from tests.train import runs
from tests.train.test_trainer import DOCUMENTS, assert_same_gradients, gradients, trainer

BLOCKS = {"compile": {"kind": "blocks"}}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_gradients_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks are two pieces of code, or a few more where the first block differs, whatever documents lie in a batch."""
    from torch._dynamo.utils import counters

    monkeypatch.delenv(compiling.CACHE, raising=False)
    monkeypatch.setattr(compiling, "env", lambda: Env(tmp_path / "cache", None, None))
    counters.clear()
    made = trainer(tmp_path, loaded=tiny.build(num_layers=10), **BLOCKS)
    plain = trainer(tmp_path, loaded=tiny.build(num_layers=10))
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        want, got = (gradients(one, runs.batch(*documents)) for one in (plain, made))
        assert_close(torch.tensor(got[0]), torch.tensor(want[0]), "fp32_reorder")
        assert_same_gradients(got[1], want[1], "fp32_reference")
        for one in (plain, made):
            one.loaded.model.zero_grad()
    assert counters["stats"]["unique_graphs"] <= 6
    assert any((tmp_path / "cache" / "compiled").rglob("*.so"))
    before = set((tmp_path / "cache" / "compiled").rglob("*.so"))
    torch.compiler.reset()
    again = trainer(tmp_path, loaded=tiny.build(num_layers=10), **BLOCKS)
    gradients(again, runs.batch(*DOCUMENTS))
    assert set((tmp_path / "cache" / "compiled").rglob("*.so")) == before
    monkeypatch.delenv(compiling.CACHE)
    torch.compiler.reset()


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"needs a C\+\+ compiler"):
        trainer(tmp_path, **BLOCKS)
    with pytest.raises(ConfigError, match=r"leave activations or compile out"):
        runs.recipe(tmp_path, activations={"kind": "selective"}, **BLOCKS)
