"""A mesh changes nothing but the order of sums: gradients, losses, norms and checkpoints are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import assert_close
from tests.train.parallel.job import CASES

ALL = [(num_ranks, name) for num_ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What rank 0 found, by number of ranks and name of the case."""

    @cache
    def folder(num_ranks: int) -> Path:
        made = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        command = [sys.executable, "-m", "tests.train.parallel.job", str(made), str(num_ranks)]
        paths = os.pathsep.join(["src", ".", *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}, cwd=Path(__file__).parents[3])
        return made

    return cache(lambda num_ranks, name: torch.load(folder(num_ranks) / f"{name}.pt"))


def close(got: dict[str, Tensor], want: dict[str, Tensor], row: str) -> None:
    """Relative to the largest of all: a sum that cancels has no scale of its own."""
    assert got.keys() == want.keys()
    scale = max(x.abs().max() for x in want.values()).float()
    for name, x in got.items():
        assert_close(torch.cat([x.flatten().float(), scale[None]]), torch.cat([want[name].flatten().float(), scale[None]]), row)


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_gradients_are_those_of_one_process(num_ranks: int, name: str, results: Any) -> None:
    """In one micro-batch and in four, of every parameter; the loss and the norm with them."""
    found = results(num_ranks, name)
    for micros in ("gradients1", "gradients4")[: 1 if CASES[num_ranks][name].exact else 2]:
        got, want = found[micros], found["alone"][micros]
        for scalar in ("loss", "norm"):
            assert_close(got.pop(scalar), want.pop(scalar), "fp32_parallel")
        close(got, want, "fp32_parallel")


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_steps_are_those_of_one_process(num_ranks: int, name: str, results: Any) -> None:
    found, alone = results(num_ranks, name), results(num_ranks, name)["alone"]
    assert found["actions"] == alone["actions"] and found["trained"] == alone["trained"]
    assert_close(torch.tensor(found["flops"]), torch.tensor(alone["flops"]), "fp32_parallel")
    for numbers in ("losses", "norms"):
        assert_close(found[numbers], alone[numbers], "fp32_steps")
    assert_close(torch.tensor(found["validation"]), torch.tensor(alone["validation"]), "fp32_steps")


@pytest.mark.parametrize(("num_ranks", "name"), [(num_ranks, name) for num_ranks, name in ALL if CASES[num_ranks][name].exact])
def test_steps_have_the_bits_of_one_process(num_ranks: int, name: str, results: Any) -> None:
    """Where no sum has more than two parts, and no gradient is scaled by a norm, whose parts are others."""
    found, alone = results(num_ranks, name), results(num_ranks, name)["alone"]
    assert torch.equal(found["losses"], alone["losses"])
    for got, want in ((found["weights"], alone["weights"]), (found["optimizer"], alone["optimizer"])):
        assert got.keys() == want.keys() and all(torch.equal(x, want[key]) for key, x in got.items())


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_what_goes_wrong_on_one_rank_is_seen_by_all(num_ranks: int, name: str, results: Any) -> None:
    found = results(num_ranks, name)
    assert found["fault"] == num_ranks * found["alone"]["fault"]
    assert found["fault"][0].startswith("skip: the loss is nan")


@pytest.mark.parametrize(("num_ranks", "name"), ALL)
def test_what_is_saved_has_the_same_bits_on_any_mesh(num_ranks: int, name: str, results: Any) -> None:
    """Weights that nobody moved; then weights and optimizer states that went to another mesh, and back; and the files of both."""
    found = results(num_ranks, name)
    pairs = [(found["before"], found["alone"]["before"])]
    pairs += [(found[f"{what}{number}"], found[what]) for what in ("weights", "optimizer") for number in (0, 1)]
    for got, want in pairs:
        assert list(got.keys() - want.keys()) == list(want.keys() - got.keys()) == []
        assert all(torch.equal(x, want[key]) and x.shape == want[key].shape for key, x in got.items())
    assert found["optimizer"].keys() == found["alone"]["optimizer"].keys()
    assert all(x.shape == found["alone"]["optimizer"][key].shape for key, x in found["optimizer"].items())
    assert len(set(found["models"])) == 1


def test_what_lives_elsewhere_is_here_only_while_it_is_needed(results: Any) -> None:
    """On each rank, behind a step and while nothing is saved."""
    found = results(2, "muon")
    assert found["blocks_bytes"] == found["alone"]["blocks_bytes"] == 0
    assert results(2, "zero2")["blocks_bytes"] > 0
