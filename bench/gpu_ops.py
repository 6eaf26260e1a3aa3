"""Triton's operations of training beside torch's on a GPU: do they agree at real sizes, do they repeat to the last bit, what do they take.

    python bench/gpu_ops.py [--only rms,rope,...] [--tokens 8192] [--dtype bfloat16] [--json]
    python bench/gpu_ops.py --compile 80,90 [--translate] [--only rms,rope,...] [--dtype bfloat16] [--json]

Times are of forward and backward pass together, medians with a cold second-level cache. The plan is the slower of moving what has to be
moved once and of the products, at the rates of a plain copy and of a large square product, both measured at the start.

With --compile everything is compiled for GPUs of these compute capabilities and nothing is run, which needs no GPU: what the compiler
says of registers and shared memory is what can be known of kernels without one. --translate stops where types and shapes have been
checked, which takes seconds instead of minutes. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
from tests.tolerance import RELATIVE  # noqa: E402
from torch import Tensor  # noqa: E402

from gemel.config.optim import OptimConfig  # noqa: E402
from gemel.ops import activation, head, norm, rotary, triton  # noqa: E402
from gemel.ops.adamw import Draws, How, Part, Stored  # noqa: E402
from gemel.ops.causal import alibi_slopes  # noqa: E402
from gemel.ops.train import packed_attention_reference  # noqa: E402
from gemel.train.optim import build, noise  # noqa: E402

HOW_TORCH = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False, "maximize": False}
SHARED_BYTES = {
    80: 163 * 2**10,
    86: 99 * 2**10,
    89: 99 * 2**10,
    90: 227 * 2**10,
    100: 227 * 2**10,
    120: 99 * 2**10,
}  # of a program, at most
ROWS = {torch.float32: "fp32_reference", torch.bfloat16: "bf16_gradients", torch.float16: "bf16_gradients"}


@dataclass(frozen=True)
class Sizes:
    """Of a model and a batch; those of a model of 1 to 2 billion parameters."""

    tokens: int
    document: int = 2048
    width: int = 2048
    ffn: int = 5632
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 49152
    matrices: int = 40  # that the optimizer moves, of width x width


@dataclass(frozen=True)
class Case:
    """An operation and torch's version of it; each call gives what can be compared. What has to be moved, and computed, at the least."""

    name: str
    ours: Callable[[], Sequence[Tensor]]
    theirs: Callable[[], Sequence[Tensor]]
    moved_bytes: float
    flops: float = 0.0
    repeats: bool = True  # a second call with the same inputs gives the same


@dataclass(frozen=True)
class Result:
    """Milliseconds, and the largest difference of any result in parts of its largest number."""

    name: str
    ours_ms: float
    torch_ms: float
    planned_ms: float
    difference: float
    good: bool


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel takes of a processor; what it spills of its registers goes through memory."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        takes = f"{self.registers:4d} registers, {self.spilled_bytes:5d} B spilled, {self.shared_bytes:7d} B shared"
        return f"sm_{self.capability}  {self.name:<28} {takes}"


def both_ways(operation: Callable[..., Tensor], tensors: Sequence[Tensor], slope: Tensor) -> Sequence[Tensor]:
    """The output, and its gradients for this slope of the loss."""
    out = operation(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, slope)


def differentiated(
    name: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor], shape: Sequence[int], **work: float
) -> Case:
    """A case of an operation that returns a tensor of this shape."""
    tensors = [tensor.requires_grad_() for tensor in inputs]
    slope = torch.randn(shape, device=inputs[0].device).to(inputs[0].dtype if shape else torch.float32)
    return Case(name, partial(both_ways, ours, tensors, slope), partial(both_ways, theirs, tensors, slope), **work)


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype, only: Sequence[str]) -> Iterator[Case]:
    """All operations, or those with one of these words in their names; each is made when it is its turn, so that no two take memory."""
    torch.manual_seed(0)
    random = partial(torch.randn, device=device, dtype=dtype)
    makers = partial(between_products, sizes, random), partial(attention, sizes, random), partial(others, sizes, random)
    for case in chain.from_iterable(make() for make in makers):
        if any(word in case.name for word in only):
            yield case


def others(sizes: Sizes, random: Callable[..., Tensor]) -> Iterator[Case]:
    """What there is once in a step."""
    yield head_loss(sizes, random)
    yield optimizer(sizes, random)
    yield stored_optimizer(sizes, random)


def between_products(sizes: Sizes, random: Callable[..., Tensor]) -> Iterator[Case]:
    """Norms, rotation and SwiGLU: nothing but moving numbers."""
    tokens, item = sizes.tokens, random(1).itemsize
    shape = tokens, sizes.width
    norms = (partial(one, eps=1e-5) for one in (triton.rms_norm, norm.rms_norm))
    yield differentiated("rms_norm", *norms, (random(shape), random(sizes.width)), shape, moved_bytes=5 * tokens * sizes.width * item)
    shape = tokens, sizes.heads, 64
    norms = (partial(one, eps=1e-5) for one in (triton.rms_norm, norm.rms_norm))
    numbers = tokens * sizes.heads * 64
    yield differentiated("rms_norm of heads", *norms, (random(shape), random(64)), shape, moved_bytes=5 * numbers * item)
    angles = {"cos_T1H": random(tokens, 1, 64), "sin_T1H": random(tokens, 1, 64)}
    turns = (partial(one, **angles) for one in (triton.rope, rotary.rope))
    yield differentiated("rope", *turns, (random(shape),), shape, moved_bytes=4 * numbers * item)
    shape, gated = (tokens, sizes.ffn), random(tokens, 2 * sizes.ffn)
    yield differentiated("swiglu", triton.swiglu, activation.swiglu, (gated,), shape, moved_bytes=8 * tokens * sizes.ffn * item)


def attention(sizes: Sizes, random: Callable[..., Tensor]) -> Iterator[Case]:
    """Equal documents; torch computes them one by one."""
    tokens, item = sizes.tokens, random(1).itemsize
    starts = (*range(0, tokens, sizes.document), tokens)
    for name, width, how in (
        ("attention, heads of 64", 64, {}),
        ("attention, heads of 128", 128, {}),
        ("attention, window of 512", 64, {"window": 512}),
        ("attention, ALiBi", 64, {"slopes_N": alibi_slopes(sizes.heads)}),
    ):
        seen = min(how.get("window", sizes.document), sizes.document)
        pairs = tokens * (sizes.document - seen / 2) * seen / sizes.document  # all keys of the first `seen` queries are fewer by half
        shapes = [(tokens, heads, width) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
        yield differentiated(
            *(name, partial(triton.packed_attention, starts=starts, **how), partial(packed_attention_reference, starts=starts, **how)),
            *([random(shape) for shape in shapes], shapes[0]),
            moved_bytes=item * width * tokens * (6 * sizes.heads + 6 * sizes.kv_heads),
            flops=14 * sizes.heads * width * pairs,  # two products forward, five back
        )


def head_loss(sizes: Sizes, random: Callable[..., Tensor]) -> Case:
    """Three products, and logits written and read twice."""
    hidden_TD, weight_VD = random(sizes.tokens, sizes.width) * sizes.width**-0.5, random(sizes.vocab, sizes.width)
    given = {
        "targets_T": torch.arange(sizes.tokens, device=hidden_TD.device) % sizes.vocab,
        "weights_T": torch.full((sizes.tokens,), 1 / sizes.tokens, device=hidden_TD.device),
        "z_loss": 1e-4,
    }

    def loss(operation: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> Tensor:
        return operation(*tensors, **given)[0]

    operations = partial(loss, triton.head_cross_entropy), partial(loss, head.cross_entropy)
    products = 2 * sizes.tokens * sizes.width * sizes.vocab
    moved_bytes = 4 * sizes.tokens * sizes.vocab * hidden_TD.itemsize
    return differentiated("head and loss", *operations, (hidden_TD, weight_VD), (), moved_bytes=moved_bytes, flops=3 * products)


def optimizer(sizes: Sizes, random: Callable[..., Tensor]) -> Case:
    """Weights in fp32, gradients in the type of the run; torch's fused one wants them alike and gets fp32."""
    shape = sizes.width, sizes.width
    start, gradients = [random(shape).float() for _ in range(sizes.matrices)], [random(shape) for _ in range(sizes.matrices)]
    ours = [Part(*(Stored(w.clone()), g, *(Stored(torch.zeros_like(w)) for _ in range(2)))) for w, g in zip(start, gradients, strict=True)]
    how = How(keep=1 - 1e-4, rest1=0.1, beta2=0.95, rest2=0.05, root=0.05**0.5, eps=1e-8, step=1e-2, shrink=0.0)
    table = torch.zeros(1, dtype=torch.int32, device=start[0].device)
    weights, moments = [w.clone() for w in start], [[torch.zeros_like(w) for w in start] for _ in range(2)]
    wide = [gradient.float() for gradient in gradients]
    steps = [torch.zeros((), device=one.device) for one in start]

    def step_ours() -> Sequence[Tensor]:
        for part in ours:
            triton.adamw(how, part, table)
        return [part.weight.data for part in ours]

    def step_theirs() -> Sequence[Tensor]:
        for step in steps:
            step.fill_(1.0)
        torch._fused_adamw_(
            *(weights, wide, *moments, [], steps),
            **HOW_TORCH,
        )
        return weights

    numbers = sizes.matrices * sizes.width**2
    return Case("adamw", step_ours, step_theirs, moved_bytes=numbers * (24 + gradients[0].itemsize), repeats=False)


def stored_optimizer(sizes: Sizes, random: Callable[..., Tensor]) -> Case:
    """Weights in bf16 with their lower halves, moments in bf16, rounded at random; beside unpacking, torch's step and packing."""
    settings = OptimConfig.parse({"weights": "master", "state": "bf16", "weight_decay": 0.1, "exempt": ()})
    shape = sizes.width, sizes.width
    start, gradients = ([random(shape).bfloat16() for _ in range(sizes.matrices)] for _ in range(2))
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    plain = build(settings, [(f"layers.{i}.weight", w) for i, w in enumerate(weights)])
    how = How(keep=1 - 1e-4, rest1=0.1, beta2=0.95, rest2=0.05, root=0.05**0.5, eps=1e-8, step=1e-2, shrink=0.0)
    table, num_stretches = noise.table(start[0].device), -(-(sizes.width**2) // noise.TABLE)
    draws = Draws(tuple(noise.key(i) for i in range(num_stretches)), 0, noise.TABLE)
    ours = [
        Part(
            Stored(w.clone().view(-1), low=torch.zeros(w.numel(), dtype=torch.int16, device=w.device)),
            gradient.view(-1),
            *(Stored(torch.zeros_like(w).view(-1), draws=draws) for _ in range(2)),
        )
        for w, gradient in zip(start, gradients, strict=True)
    ]

    def step_ours() -> Sequence[Tensor]:
        for part in ours:
            triton.adamw(how, part, table)
        return [part.weight.data.view(shape) for part in ours]

    def step_theirs() -> Sequence[Tensor]:
        for w, gradient in zip(weights, gradients, strict=True):
            w.grad = gradient
        with mock.patch.object(triton, "takes", lambda *_: False):
            plain.step(1e-3)
        return [w.detach() for w in weights]

    return Case("adamw as stored", step_ours, step_theirs, moved_bytes=sizes.matrices * sizes.width**2 * 18, repeats=False)


# --- with a GPU ---------------------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, dtype: torch.dtype, only: Sequence[str]) -> list[Result]:
    """Every case, checked and timed."""
    from triton.testing import do_bench

    device = torch.device("cuda")
    median_ms = partial(do_bench, warmup=20, rep=100, return_mode="median")
    flops_per_ms, bytes_per_ms = peaks(device, dtype, median_ms)
    print(f"{torch.cuda.get_device_name()}: {flops_per_ms / 1e9:.0f} TFLOP/s, {bytes_per_ms / 1e6:.0f} GB/s, {dtype}")
    results = []
    for case in cases(sizes, device, dtype, only):
        got, want = [one.clone() for one in case.ours()], case.theirs()
        difference = max(map(apart, got, want))
        same = not case.repeats or all(map(torch.equal, got, case.ours()))
        planned_ms = max(case.moved_bytes / bytes_per_ms, case.flops / flops_per_ms)
        result = Result(
            case.name, median_ms(case.ours), median_ms(case.theirs), planned_ms, difference, same and difference <= RELATIVE[ROWS[dtype]]
        )
        said = f"{result.ours_ms:8.3f} ms, torch {result.torch_ms:8.3f}, planned {planned_ms:8.3f}, apart by {difference:.1e}"
        print(f"{'ok  ' if result.good else 'FAIL'}  {case.name:<25} {said}{'' if same else ', and NOT THE SAME TWICE'}", flush=True)
        results.append(result)
    return results


def peaks(device: torch.device, dtype: torch.dtype, median_ms: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
    """Operations per millisecond of a large square product, and bytes per millisecond of a copy, read and written."""
    square = torch.randn(8192, 8192, device=device, dtype=dtype)
    return 2 * 8192**3 / median_ms(lambda: square @ square), 2 * square.nbytes / median_ms(square.clone)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference in parts of the largest number."""
    return ((got.float() - want.float()).abs().max() / want.float().abs().max()).item()


# --- without one --------------------------------------------------------------------------------------------------------------------


def compile_all(capabilities: Sequence[int], dtype: torch.dtype, only: Sequence[str], *, translate: bool) -> list[Kernel]:
    """Every kernel that the cases launch, for every capability. What is only translated takes nothing yet."""
    kernels: list[Kernel] = []
    for capability in capabilities:
        instead_of_launching(capability, kernels, translate=translate)
        for case in cases(Sizes(tokens=8, document=4, vocab=9000, matrices=1), torch.device("cpu"), dtype, only):
            case.ours()
    return kernels


def instead_of_launching(capability: int, kernels: list[Kernel], *, translate: bool) -> None:
    """Let launches compile the kernel that they would have launched, once, and note what it takes."""
    from triton import compile as compile_kernel
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target, seen = GPUTarget("cuda", capability, 32), set()
    backend = make_backend(target)

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:  # noqa: ARG001
        kwargs |= {"debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
        bound, types, options = create_function_from_signature(self.signature, self.params, backend)(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, types, options)
        source = ASTSource(self, signature, constants, attributes)
        if source.hash() in seen:
            return
        seen.add(source.hash())
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.lstrip('_')}"
        if translate:
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
            kernels.append(Kernel(name, capability, 0, 0, 0))
            return
        compiled = compile_kernel(source, target=target, options=options.__dict__)
        kernels.append(Kernel(name, capability, *registers(compiled.asm["cubin"]), compiled.metadata.shared))
        print(kernels[-1], flush=True)

    JITFunction.run = run


def registers(cubin: bytes) -> tuple[int, int]:
    """How many registers a compiled kernel uses, and bytes of what did not fit into them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used, spilled = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(used), int(spilled)


def main() -> int:
    """Measure, or compile; 0 if all is well, 1 if something is not, 2 if nothing could be said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operations with one of these words in their names")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--compile", metavar="CAPABILITIES", help="compile for these, say 80,90, and run nothing")
    parser.add_argument("--translate", action="store_true", help="with --compile: stop once types and shapes are checked")
    parser.add_argument("--json", action="store_true", help="also print one JSON object, last")
    args = parser.parse_args()
    dtype, only = getattr(torch, args.dtype), args.only.split(",")
    if args.compile:
        kernels = compile_all([int(one) for one in args.compile.split(",")], dtype, only, translate=args.translate)
        made: list[Result] | list[Kernel] = kernels
        good = all(one.shared_bytes <= SHARED_BYTES.get(one.capability, 99 * 2**10) for one in kernels)
    elif (why := cannot_run()) is not None:
        print(f"gpu_ops: {why}; --compile 80,90 compiles the kernels without running them")
        return 2
    else:
        made = measure(Sizes(args.tokens), dtype, only)
        good = all(one.good for one in made)
    if args.json:
        print(json.dumps({"good": good, "made": [asdict(one) for one in made]}))
    return 0 if good else 1


def cannot_run() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return triton.why_not(torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(main())
