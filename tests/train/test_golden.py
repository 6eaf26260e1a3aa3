"""Whole runs give the losses that they have always given. When one should change, `scripts/golden_losses` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tolerance import RELATIVE, assert_close
from tests.train import golden_runs

ROWS = {"pretrain": "golden_fp32", "narrow": "golden_bf16", "chat": "golden_fp32"}


@pytest.mark.parametrize("name", golden_runs.RECIPES)
def test_losses_are_what_they_have_always_been(name: str, tmp_path: Path) -> None:
    want = torch.tensor(golden_runs.read(name)["losses"])
    assert_close(torch.tensor(golden_runs.losses(name, tmp_path)), want, ROWS[name])
    assert len(want) == golden_runs.STEPS and want[-1] < (1 - 10 * RELATIVE[ROWS[name]]) * want[0]  # they say something


def test_the_script_writes_what_the_test_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_runs, "FOLDER", tmp_path)
    golden_runs.write("chat", [2.0, 1.0])
    kept = golden_runs.read("chat")
    assert kept["losses"] == [2.0, 1.0] and kept["torch"] == torch.__version__ and kept["cpu"]
