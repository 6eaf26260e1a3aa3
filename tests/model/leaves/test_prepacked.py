from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gemel.config.errors import UnsupportedError
from gemel.model.build import LoadedModel, load, save
from gemel.model.leaves.linear import Leaf, Linear
from gemel.model.leaves.prepacked import PrepackedLinear, can_prepack, prepack
from gemel.model.model import Model
from tests.model.reference import logits, same_weights, tokens
from tests.model.test_model import SMALL
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(not can_prepack(torch.float32), reason="this torch was built without oneDNN")
SHAPES = [(576, 960), (1536, 576), (576, 4096), (32, 97), (7, 5)]


def _packed(in_features: int, out_features: int, bias: bool = False) -> tuple[Linear, PrepackedLinear]:
    torch.manual_seed(0)
    plain = Linear(in_features, out_features, bias)
    return plain, PrepackedLinear(plain.weight, plain.bias, plain.sections)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_is_bitwise_independent_of_how_many_there_are(shape: tuple[int, int], bias: bool, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    _, packed = _packed(*shape, bias)
    x = torch.randn(130, shape[0])
    whole = packed(x)
    for a, b in ((0, 1), (5, 6), (3, 7), (20, 36), (60, 124), (1, 130)):
        assert torch.equal(packed(x[a:b]), whole[a:b])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 4, 33])
def test_the_product_is_the_plain_one(shape: tuple[int, int], num_rows: int) -> None:
    plain, packed = _packed(*shape, bias=True)
    x = torch.randn(num_rows, shape[0])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_close(packed(x), F.linear(x.double(), plain.weight.double(), plain.bias.double()), "fp32_reorder")


def test_the_plain_weight_comes_back_bit_by_bit() -> None:
    for shape in SHAPES:
        plain, packed = _packed(*shape)
        assert torch.equal(packed.plain(), plain.weight) and (packed.in_features, packed.out_features) == shape


@pytest.mark.parametrize("style", ["column", "row"])
def test_shards_like_the_plain_leaf(style: str) -> None:
    torch.manual_seed(0)
    plain = Linear(8, 24, True, sections=(16, 8))
    packed = PrepackedLinear(plain.weight, plain.bias, plain.sections)
    for leaf in (plain, packed):
        leaf.shard(style, 0, 2)  # type: ignore[arg-type]
    assert torch.equal(packed.plain(), plain.weight) and torch.equal(packed.bias, plain.bias) and packed.sections == plain.sections
    x = torch.randn(3, plain.in_features)
    assert_close(packed(x), plain(x), "fp32_reorder")


@pytest.mark.parametrize("tied", [False, True])
def test_prepack_replaces_every_leaf_and_frees_it(tied: bool) -> None:
    torch.manual_seed(0)
    model, text = Model(SMALL.model_copy(update={"tied_head": tied})), tokens(20)
    with torch.inference_mode():
        before = logits(model, text)
        assert prepack(model) == 2 * 4 + 1
        assert_close(logits(model, text), before, "fp32_reference")
    assert all(isinstance(module, PrepackedLinear) for module in model.modules() if isinstance(module, Leaf))
    assert {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters()} == {"embed", "attn_norm", "mlp_norm", "norm"}


def test_a_packed_model_saves_what_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"qkv_bias": True, "out_bias": True})
    loaded = LoadedModel(Model(config), config, tmp_path, (2,), 1)
    save(loaded, tmp_path / "plain")
    prepack(loaded.model)
    save(loaded, tmp_path / "packed")
    assert same_weights(load(tmp_path / "packed"), load(tmp_path / "plain"))


def test_types_that_the_cpu_does_not_multiply_stay_plain() -> None:
    assert not can_prepack(torch.float16) and not can_prepack(torch.float64)
    model = Model(SMALL).to(torch.float16)
    assert prepack(model) == 0 and type(model.head) is Linear


def test_other_devices_are_refused() -> None:
    with torch.device("meta"):
        model = Model(SMALL)
    with pytest.raises(UnsupportedError, match="meta"):
        prepack(model)
