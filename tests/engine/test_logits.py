"""The contract between the runner and the sampler."""

from __future__ import annotations

import math

import pytest
import torch

from gemel.engine.logits import Logits


def test_the_likeliest_of_equal_tokens_is_the_first() -> None:
    logits = Logits.of(torch.tensor([[0.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-math.inf, -5.0, -math.inf, -5.0]]))
    assert logits.argmax_S == [1, 0, 1]
    assert logits.largest_S == [3.0, 2.0, -5.0]


@pytest.mark.parametrize("place", [0, 7, 12])
def test_nan_anywhere_shows_in_the_largest_of_that_row_only(place: int) -> None:
    values_SV = torch.randn(3, 13, generator=torch.Generator().manual_seed(0))
    values_SV[1, 5] = 100.0
    values_SV[1, place] = math.nan
    assert [math.isnan(largest) for largest in Logits.of(values_SV).largest_S] == [False, True, False]
