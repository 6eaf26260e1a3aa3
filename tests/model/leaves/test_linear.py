import pytest
import torch
from torch import nn

from gemel.config.errors import ConfigError
from gemel.model.leaves.linear import Leaf, Linear, replace
from gemel.model.model import Model
from tests.model.test_model import SMALL
from tests.tolerance import assert_close


@pytest.mark.parametrize("bias", [False, True])
def test_column_parts_hold_a_share_of_every_section(bias: bool) -> None:
    torch.manual_seed(0)
    whole, x = Linear(6, 16, bias, sections=(8, 4, 4)), torch.randn(3, 6)
    parts = [Linear(6, 16, bias, sections=(8, 4, 4)) for _ in range(2)]
    for i, part in enumerate(parts):
        part.load_state_dict(whole.state_dict())
        part.shard("column", i, 2)
        assert (part.out_features, part.sections, part.plain().shape) == (8, (4, 2, 2), (8, 6))
    sections = [torch.cat(pair, -1) for pair in zip(*(part(x).split(part.sections, -1) for part in parts), strict=True)]
    assert_close(torch.cat(sections, -1), whole(x), "fp32_reorder")


@pytest.mark.parametrize("bias", [False, True])
def test_row_parts_sum_to_the_whole_with_one_bias(bias: bool) -> None:
    torch.manual_seed(0)
    whole, x = Linear(6, 4, bias), torch.randn(3, 6)
    total = torch.zeros(3, 4)
    for i in range(3):
        part = Linear(6, 4, bias)
        part.load_state_dict(whole.state_dict())
        part.shard("row", i, 3)
        assert part.in_features == 2 and (part.bias is not None) == (bias and i == 0)
        total += part(x[:, 2 * i : 2 * i + 2])
    assert_close(total, whole(x), "fp32_reorder")


def test_a_part_keeps_no_reference_to_the_whole() -> None:
    leaf = Linear(8, 8)
    leaf.shard("column", 1, 4)
    assert leaf.weight.untyped_storage().nbytes() == 2 * 8 * 4


def test_a_width_that_does_not_divide_says_what_does() -> None:
    with pytest.raises(ConfigError, match=r"6 does not divide into 4 parts; sizes that do: 1, 2, 3"):
        Linear(8, 12, sections=(6, 6)).shard("column", 0, 4)
    Linear(8, 12, sections=(6, 6)).shard("column", 0, 3)


def test_replace_by_pattern() -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    model = Model(SMALL)
    assert replace(model, "layers.*.mlp.*", Doubled) == 4
    assert isinstance(model.get_submodule("layers.1.mlp.down"), Doubled)
    assert type(model.get_submodule("layers.1.attn.qkv")) is Linear
    assert replace(model, "head", Doubled) == 1


def test_no_match_lists_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(Model(SMALL), "layers.*.wqkv", lambda leaf: leaf)
    for name in ("head", "layers.*.attn.qkv", "layers.*.attn.out", "layers.*.mlp.gate_up", "layers.*.mlp.down"):
        assert name in str(caught.value)


def test_only_matrix_products_are_leaves() -> None:
    model = Model(SMALL)
    assert isinstance(model.head, Leaf) and not isinstance(model.embed, Leaf) and not isinstance(model.norm, Leaf)
