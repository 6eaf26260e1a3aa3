"""What all tests share: few threads, so that many processes can test on one machine, and the embedded model where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gemel.config.env import env
from gemel.llm import store

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test that is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are the same tests on another device; where there is none they are skipped, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The pulled SmolLM2-135M-Instruct (or what GEMEL_TEST_MODEL names). `make test` pulls it first."""
    if chosen := env().test_model:
        return chosen
    found = store.state(store.DEFAULT)
    if found is not store.State.READY:
        pytest.skip(f"the embedded model is {found} in {store.directory(store.DEFAULT)}; run: gemel pull")
    return store.directory(store.DEFAULT)
