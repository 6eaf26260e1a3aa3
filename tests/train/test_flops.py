"""Operations of a batch, counted by torch and by hand."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gemel.config.model import ModelConfig
from gemel.model.attend import PackedAttend
from gemel.ops.cpu import training
from gemel.train.flops import Flops
from tests import tiny
from tests.train import runs


@pytest.mark.parametrize("kind", ["gqa", "mqa", "learned"])
def test_products_are_what_torch_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts its own products, and no attention on CPUs."""
    monkeypatch.setattr(training, "kernels", lambda: None)
    model = tiny.build(kind).model.requires_grad_(True)
    batch = runs.batch(*tiny.documents(2, 2, 2, 2))
    with FlopCounterMode(display=False) as counter:
        hidden_TD = model(batch.tokens_T, batch.positions_T, PackedAttend(model.config, batch.starts))
        F.cross_entropy(model.head(hidden_TD), batch.targets_T).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    assert Flops(model).of(batch) - products == 3 * attention(model.config, 4 * [1])


def attention(config: ModelConfig, lengths: list[int]) -> int:
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 4 * config.num_heads * config.head_width * config.num_layers * pairs


def test_attention_by_hand() -> None:
    model, batch = tiny.build("gqa").model, runs.batch(*tiny.documents(5, 11))
    other = runs.batch(*tiny.documents(8, 8))
    assert batch.num_tokens == other.num_tokens == 14
    difference = attention(model.config, [4, 10]) - attention(model.config, [7, 7])
    assert Flops(model).of(batch) - Flops(model).of(other) == 3 * difference
    windowed = tiny.build("window").model  # 7 in the first layer: of 10 tokens, 3 lose 1, 2 and 3 keys
    assert Flops(model).of(batch) - Flops(windowed).of(batch) == 3 * 4 * 4 * 8 * (1 + 2 + 3)


def test_what_is_not_trained_needs_no_head() -> None:
    model = tiny.build("gqa").model
    whole, half = runs.batch(*tiny.documents(5)), runs.batch(*tiny.documents(5), trained=[[True, False, True, False]])
    assert Flops(model).of(whole) - Flops(model).of(half) == 6 * 97 * 32 * 2
