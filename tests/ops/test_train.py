"""The differentiable native operations: forward and backward against the plain ones in float64, whose own gradients gradcheck confirms.

Sizes are odd on purpose: nothing divides by a vector, a tile, a panel or a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gemel.ops import activation, alibi_slopes, hardware, head, norm, rotary, train
from gemel.ops.cpu import training
from tests.tolerance import assert_close

pytestmark = pytest.mark.skipif(training.kernels() is None, reason="the kernels are not compiled")

Operation = Callable[..., Any]
ROWS = {torch.float32: "fp32_reorder", torch.bfloat16: "bf16_reorder"}
PRODUCTS_ARE_NATIVE = train.products_are_native
STARTS = (0, 1, 98, 99, 300, 307)  # documents of one token, of a block and one, of two blocks and some, and a short one


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products too, whatever this processor is better at; and as many threads as before."""
    monkeypatch.setattr(train, "products_are_native", lambda _: True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angle = randn(num_tokens, 1, width // 2, seed=5) * 3
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def results(operation: Operation, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """What it gives, and the gradient of every input under a random one of the result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out: Tensor = operation(*leaves)
    out.backward(randn(*out.shape, seed=seed).to(out.dtype))  # type: ignore[no-untyped-call]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_right(native: Operation, plain: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The native operation in this type, on the same numbers as the plain one in float64."""
    narrow = [x.to(dtype) for x in inputs]
    got = results(native, narrow)
    want = results(plain, [x.double() for x in narrow])
    assert len(got) == len(want) == 1 + len(inputs)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, ROWS[dtype])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


# --- each against float64 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (7, 5), (67, 576), (33, 3, 20)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = (randn(*shape), 1 + randn(shape[-1], seed=1) / 4)
    assert_right(lambda x, w: train.rms_norm(x, w, 1e-5), lambda x, w: norm.rms_norm(x, w, 1e-5), inputs, dtype)


def test_rms_norm_by_hand() -> None:
    """(3, 4) has a mean square of 12.5."""
    y = train.rms_norm(torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([1.0, 2.0]), 0.0)
    assert_close(y, torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5), "fp32_reorder")


@pytest.mark.parametrize(("num_tokens", "num_heads", "width"), [(1, 1, 2), (35, 3, 20), (70, 5, 64)])
def test_rope(num_tokens: int, num_heads: int, width: int, dtype: torch.dtype) -> None:
    cos, sin = (x.to(dtype) for x in angles(num_tokens, width))
    wide = cos.double(), sin.double()
    assert_right(lambda x: train.rope(x, cos, sin), lambda x: rotary.rope(x, *wide), (randn(num_tokens, num_heads, width),), dtype)


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 1), (9, 7), (65, 96)])
def test_swiglu(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    assert_right(train.swiglu, activation.swiglu, (3 * randn(num_tokens, 2 * width),), dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 7), (100, 67, 97), (1500, 20, 33), (97, 1100, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    """Also where the sum, forward or backward, is too long to go through at once."""
    num_tokens, width, out = sizes
    inputs = [randn(num_tokens, width), randn(out, width, seed=1) / math.sqrt(width), *([randn(out, seed=2)] if bias else [])]
    assert_right(train.linear, torch.nn.functional.linear, inputs, dtype)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_product(native: bool, add: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of transposed views, into a part of something wider."""
    monkeypatch.setattr(train, "products_are_native", lambda _: native)
    a, b, whole = randn(67, 31).to(dtype), randn(67, 45, seed=1).to(dtype), randn(31, 100, seed=2)
    out, want = whole[:, 20:65], a.double().t() @ b.double() + (whole[:, 20:65].double() if add else 0)
    assert train.product(a.t(), b, out, add=add) is out
    assert_close(out, want, ROWS[dtype])
    assert_close(whole[:, 65:], randn(31, 100, seed=2)[:, 65:], "exact")


@pytest.mark.parametrize(("heads", "width"), [((4, 2), 24), ((3, 3), 5), ((6, 1), 64)])
@pytest.mark.parametrize(("window", "alibi"), [(None, False), (2, False), (37, False), (150, True), (None, True)])
def test_packed_attention(heads: tuple[int, int], width: int, window: int | None, alibi: bool, dtype: torch.dtype) -> None:
    slopes = alibi_slopes(heads[0]) if alibi else None
    inputs = [randn(STARTS[-1], num, width, seed=num) for num in (heads[0], heads[1], heads[1])]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return train.packed_attention_reference(q, k, v, STARTS, window, None if slopes is None else slopes.double())

    assert_right(lambda q, k, v: train.packed_attention(q, k, v, STARTS, window, slopes), plain, inputs, dtype)


def test_packed_attention_by_hand() -> None:
    """One head of width 1: the first token sees itself; scores 0 and log 3 weigh values 1/4 and 3/4."""
    q, k = torch.tensor([0.0, 1.0]).view(2, 1, 1), torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    out = train.packed_attention(q, k, torch.tensor([4.0, 8.0]).view(2, 1, 1), (0, 2))
    assert_close(out.flatten(), torch.tensor([4.0, 7.0]), "fp32_reorder")


@pytest.mark.parametrize("sizes", [(1, 1, 3), (37, 16, 101), (50, 33, 2100)])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.2), (1e-2, 0.2)])
def test_head_cross_entropy(sizes: tuple[int, int, int], z_loss: float, smoothing: float, dtype: torch.dtype) -> None:
    num_tokens, width, vocab = sizes
    hidden, weight = randn(num_tokens, width), randn(vocab, width, seed=1)
    targets = torch.randint(0, vocab, (num_tokens,), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(num_tokens, generator=torch.Generator().manual_seed(3)) + 0.1
    weights[num_tokens // 2] = 0.0 if num_tokens > 1 else 1.0
    targets[num_tokens // 2] = -100 if num_tokens > 1 else 0
    narrow = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in narrow]
    got, got_z = train.head_cross_entropy(*narrow, targets, weights, z_loss, smoothing)
    want, want_z = head.cross_entropy(*exact, targets.clamp(min=0), weights.double(), z_loss, smoothing)
    (got * 2).backward()
    (want * 2).backward()
    assert got.dtype == got_z.dtype == torch.float32 and not got_z.requires_grad
    assert_close(got, want, ROWS[dtype])
    assert_close(got_z, want_z, ROWS[dtype])
    for ours, theirs in zip(narrow, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        assert_close(ours.grad, theirs.grad, ROWS[dtype])


def test_head_cross_entropy_by_hand() -> None:
    """Two classes with logits 0 and log 3: probabilities 1/4 and 3/4."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    got, z = train.head_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([2.0]), z_loss=0.5)
    assert_close(z, torch.tensor(math.log(4) ** 2), "fp32_reorder")
    assert_close(got - z, torch.tensor(2 * math.log(4)), "fp32_reorder")


def test_many_slices_of_tokens_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary so large that a few hundred tokens are a slice: their gradients add up."""
    num_tokens, vocab = 700, 60_000
    hidden, weight = randn(num_tokens, 4).requires_grad_(), randn(vocab, 4, seed=1).requires_grad_()
    targets = torch.arange(num_tokens) * 83
    train.head_cross_entropy(hidden, weight, targets, torch.ones(num_tokens))[0].backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    head.cross_entropy(*exact, targets, torch.ones(num_tokens))[0].backward()
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_close(ours.grad, theirs.grad, "fp32_reorder")


# --- the truth ----------------------------------------------------------------------------------------------------------------------


def test_gradients_of_the_plain_versions_are_those_of_finite_differences() -> None:
    def wide(*shape: int, seed: int = 0) -> Tensor:
        return randn(*shape, seed=seed).double().requires_grad_()

    cos, sin = (x.double() for x in angles(3, 4))
    targets, weights = torch.tensor([1, 4, 0]), torch.tensor([0.5, 2.0, 1.0]).double()
    slopes = alibi_slopes(4).double()
    check = partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(lambda x, w: norm.rms_norm(x, w, 1e-5), (wide(3, 5), wide(5, seed=1)))
    assert check(lambda x: rotary.rope(x, cos, sin), (wide(3, 2, 4),))
    assert check(activation.swiglu, (wide(3, 6),))
    qkv = wide(5, 4, 3), wide(5, 2, 3, seed=1), wide(5, 2, 3, seed=2)
    for window, penalty in ((None, None), (2, slopes)):
        assert check(lambda q, k, v, w=window, s=penalty: train.packed_attention_reference(q, k, v, (0, 2, 5), w, s), qkv)
    for z_loss, smoothing in ((0.0, 0.0), (0.1, 0.3)):
        assert check(
            lambda h, w, z=z_loss, s=smoothing: head.cross_entropy(h, w, targets, weights, z, s)[0], (wide(3, 4), wide(5, 4, seed=1))
        )


# --- bits ---------------------------------------------------------------------------------------------------------------------------

NUM = STARTS[-1]
WHOLE = {
    "rms_norm": (lambda x, w: train.rms_norm(x, w, 1e-5), (randn(NUM, 72), randn(72, seed=1))),
    "rope": (lambda x: train.rope(x, *angles(NUM, 24)), (randn(NUM, 3, 24),)),
    "swiglu": (train.swiglu, (randn(NUM, 2 * 50),)),
    "linear": (train.linear, (randn(NUM, 72), randn(130, 72, seed=1), randn(130, seed=2))),
    "attention": (
        lambda q, k, v: train.packed_attention(q, k, v, STARTS, 60, alibi_slopes(4)),
        (randn(NUM, 4, 24), randn(NUM, 2, 24, seed=1), randn(NUM, 2, 24, seed=2)),
    ),
    "head": (
        lambda h, w: train.head_cross_entropy(h, w, torch.arange(NUM), torch.linspace(0.1, 1, NUM), 1e-3, 0.1)[0],
        (randn(NUM, 72), randn(500, 72, seed=1)),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    operation, inputs = WHOLE[name]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(operation, [x.to(dtype) for x in inputs]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu", "linear"])
def test_rows_are_the_same_bits_alone(name: str, dtype: torch.dtype) -> None:
    operation, inputs = WHOLE[name]
    whole = operation(*(x.to(dtype) for x in inputs))
    cos, sin = angles(NUM, 24)
    for a, b in ((0, 1), (3, 20), (50, 307)):
        part = (lambda x, a=a, b=b: train.rope(x, cos[a:b], sin[a:b])) if name == "rope" else operation
        if name == "rope" and dtype != torch.float32:
            continue
        assert torch.equal(part(inputs[0][a:b].to(dtype), *(x.to(dtype) for x in inputs[1:])), whole[a:b])


@pytest.mark.parametrize(("window", "alibi"), [(None, False), (60, True)])
def test_documents_are_the_same_bits_alone(window: int | None, alibi: bool, dtype: torch.dtype) -> None:
    """Outputs and all gradients."""
    slopes, inputs = alibi_slopes(4) if alibi else None, [x.to(dtype) for x in WHOLE["attention"][1]]
    leaves = [x.clone().requires_grad_() for x in inputs]
    whole, d_out = train.packed_attention(leaves[0], leaves[1], leaves[2], STARTS, window, slopes), randn(NUM, 4, 24, seed=9).to(dtype)
    whole.backward(d_out)  # type: ignore[no-untyped-call]
    for a, b in pairwise(STARTS):
        alone = [x[a:b].clone().requires_grad_() for x in inputs]
        out = train.packed_attention(alone[0], alone[1], alone[2], (0, b - a), window, slopes)
        out.backward(d_out[a:b])  # type: ignore[no-untyped-call]
        assert torch.equal(out, whole[a:b])
        for part, leaf in zip(alone, leaves, strict=True):
            assert part.grad is not None and leaf.grad is not None and torch.equal(part.grad, leaf.grad[a:b])


@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "linear", "swiglu"])
def test_memory_need_not_be_contiguous(name: str) -> None:
    """Views of a larger tensor, and gradients that are expanded."""
    operation, inputs = WHOLE[name]
    spread = [torch.stack((x, x), 1).flatten(0, 1)[::2] if x.dim() > 1 else x for x in inputs]
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x for x in inputs]
    want = results(operation, inputs)
    for views in (spread, turned):
        assert all(torch.equal(a, b) for a, b in zip(results(operation, views), want, strict=True))
    leaves = [x.clone().requires_grad_() for x in inputs]
    operation(*leaves).sum().backward()
    ones = [x.clone().requires_grad_() for x in inputs]
    out = operation(*ones)
    out.backward(torch.ones_like(out))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, ones, strict=True))


# --- numbers that are none ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_where_it_is(bad: float) -> None:
    x = randn(40, 12)
    x[3, 5] = bad
    for y in (train.rms_norm(x, torch.ones(12, requires_grad=True), 1e-5), train.linear(x, randn(8, 12).requires_grad_()), train.swiglu(x)):
        finite = y.isfinite().all(1)
        assert not finite[3] and finite.sum() == 39
    q, k, v = (randn(NUM, 2, 8, seed=seed) for seed in range(3))
    k[120] = bad  # in the document of 99 to 300
    finite = train.packed_attention(q, k, v, STARTS).isfinite().flatten(1).all(1)
    assert finite[:120].all() and finite[300:].all()
    if math.isnan(bad):
        assert not finite[120:300].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_says_so(bad: float) -> None:
    hidden, weight = randn(20, 8), randn(300, 8, seed=1)
    hidden[7] = bad
    loss, _ = train.head_cross_entropy(hidden, weight, torch.arange(20), torch.ones(20))
    assert not math.isfinite(loss.item())


@pytest.mark.parametrize("target", [-1, 300])
def test_targets_beyond_the_vocabulary_are_refused(target: int) -> None:
    targets = torch.tensor([1, target])
    with pytest.raises(IndexError, match="the vocabulary has 300 entries"):
        train.head_cross_entropy(randn(2, 8), randn(300, 8), targets, torch.ones(2))
    train.head_cross_entropy(randn(2, 8), randn(300, 8), targets, torch.tensor([1.0, 0.0]))


def test_nothing_is_nothing() -> None:
    empty = torch.empty(0, 8, requires_grad=True)
    assert train.rms_norm(empty, torch.ones(8), 1e-5).shape == (0, 8)
    assert train.swiglu(empty).shape == (0, 4)
    assert train.linear(empty, randn(3, 8)).shape == (0, 3)
    assert train.rope(torch.empty(0, 2, 4), torch.empty(0, 1, 4), torch.empty(0, 1, 4)).shape == (0, 2, 4)
    loss, z = train.head_cross_entropy(randn(2, 8).requires_grad_(), randn(5, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2))
    assert loss.item() == z.item() == 0.0


# --- who does it --------------------------------------------------------------------------------------------------------------------


class Marked(Tensor):
    """Not a plain tensor."""


def natively(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a kernel is called."""
    call, names = training.Kernels._call, []
    with monkeypatch.context() as patch:
        patch.setattr(training.Kernels, "_call", lambda self, name, *args: (names.append(name), call(self, name, *args))[1])
        operation()
    return bool(names)


def test_native_versions_are_chosen_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = randn(5, 8), randn(8, seed=1)

    def normed(x: Tensor = x) -> Tensor:
        return train.rms_norm(x, w, 1e-5)

    assert natively(normed, monkeypatch)
    for unfit in (x.double(), x.half(), x.as_subclass(Marked), x[:0], x.to("meta")):
        assert not natively(lambda unfit=unfit: train.swiglu(unfit), monkeypatch)
    with torch.no_grad():
        assert natively(normed, monkeypatch)
    with torch.inference_mode():
        assert not natively(normed, monkeypatch)
    assert not natively(lambda: torch.compile(normed, backend="eager", fullgraph=True)(x), monkeypatch)
    with torch.inference_mode():  # there is no faster plain one
        assert natively(lambda: train.packed_attention(x[:, None], x[:, None], x[:, None], (0, 5)), monkeypatch)


@pytest.mark.parametrize(
    ("vendor", "isa", "fp32", "bf16"),
    [
        ("AuthenticAMD", ("avx2",), False, True),
        ("AuthenticAMD", ("avx2", "avx512f", "avx512_bf16"), True, False),
        ("GenuineIntel", ("avx2", "avx512f", "avx512_bf16"), False, False),
    ],
)
def test_products_are_whose_is_faster(vendor: str, isa: tuple[str, ...], fp32: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "vendor", lambda: vendor)
    monkeypatch.setattr(hardware, "isa", lambda *_: isa)
    decide = PRODUCTS_ARE_NATIVE.__wrapped__
    assert (decide(torch.float32), decide(torch.bfloat16), decide(torch.float64)) == (fp32, bf16, False)


def test_only_what_is_trained_gets_a_gradient() -> None:
    """Frozen weights, as under an adapter, or frozen inputs, as of the first layer."""
    for trained in (0, 1):
        inputs = [randn(6, 8), randn(4, 8, seed=1)]
        inputs[trained].requires_grad_()
        train.linear(*inputs).sum().backward()
        assert inputs[1 - trained].grad is None and inputs[trained].grad is not None
        inputs = [randn(6, 8), randn(11, 8, seed=1)]
        inputs[trained].requires_grad_()
        train.head_cross_entropy(*inputs, torch.arange(6), torch.ones(6))[0].backward()
        assert inputs[1 - trained].grad is None and inputs[trained].grad is not None


def test_autocast_multiplies_in_its_type() -> None:
    x, w = randn(6, 8).requires_grad_(), randn(40, 8, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = train.linear(x, w)
        loss, _ = train.head_cross_entropy(x, w, torch.arange(6), torch.ones(6))
        attended = train.packed_attention(x[:, None], x[:, None], x[:, None], (0, 6))
    assert y.dtype == attended.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(y, train.linear(x.bfloat16(), w.bfloat16()))
    assert torch.equal(loss, train.head_cross_entropy(x.bfloat16(), w.bfloat16(), torch.arange(6), torch.ones(6))[0])
    y.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
