"""`gemel doctor`: what this machine offers, which fast paths are on, and what to do about those that are not.

It looks and does not measure; `gemel bench` measures. Device, type and threads are those that the engine would choose, asked of the engine
itself, so that the answer cannot differ from what a server does.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from gemel.model.build import Peek

HELP = "what hardware, libraries and fast paths were found, and what to do about missing ones"
EXAMPLE = "gemel doctor"

COMPILER = "c++"  # what the install takes, if the environment does not name another
REINSTALL = "reinstall gemel with a compiler that knows these instructions"
MARKS = {"on": "+", "off": "-", "broken": "!", "fact": " "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `off` costs speed or a feature, `broken` stops Gemel from working; both may come with `advice`."""

    section: str
    name: str
    state: Literal["on", "off", "broken", "fact"]
    value: str
    advice: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look, print, and return 1 if something is broken."""
    found = [*libraries()]
    if all(finding.state != "broken" for finding in found):  # what follows imports them
        found = [*hardware(), *found, *fast_paths(), *models()]
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        print(table(found))
    return int(any(finding.state == "broken" for finding in found))


def table(found: list[Finding]) -> str:
    """The report for people."""
    lines: list[str] = []
    section = ""
    width = max(len(finding.name) for finding in found)
    for finding in found:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines.append(f"{MARKS[finding.state]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"  {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def hardware() -> Iterator[Finding]:
    """The processor and its memory."""
    from gemel.ops import hardware as probe

    cores, memory = probe.cores(), probe.memory()
    yield Finding("hardware", "cpu", "fact", probe.cpu_name())
    yield Finding("hardware", "cores", "fact", f"{cores.usable} usable ({cores.reason})")
    yield Finding("hardware", "memory", "fact", f"{memory.available_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB available")
    yield Finding("hardware", "instructions", "fact", " ".join(probe.isa()) or "unknown: this system does not say")


def libraries() -> Iterator[Finding]:
    """Python and what Gemel is declared to need, from the installed package's own metadata."""
    yield Finding("libraries", "python", "fact", f"{platform.python_version()} in {sys.prefix}")
    declared = metadata.requires("gemel") or []
    for requirement in declared:
        if "extra ==" in requirement:
            continue
        name, wanted = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()  # type: ignore[union-attr]
        advice = f"{sys.executable} -m pip install '{requirement}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("libraries", name, "broken", f"not installed, {wanted} is needed", advice)
            continue
        floor = re.search(r">=\s*([\d.]+)", wanted)
        if floor and _numbers(version) < _numbers(floor[1]):
            yield Finding("libraries", name, "broken", f"{version}, {wanted} is needed", advice)
        else:
            yield Finding("libraries", name, "fact", version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def fast_paths() -> Iterator[Finding]:
    """What makes the engine fast here, and what is missing for it to be faster."""
    import torch

    from gemel.config.engine import EngineConfig
    from gemel.engine import lower, place
    from gemel.ops import hardware as probe

    config, model = EngineConfig(), _default_model()

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if model is None else lower.reason(model.config, config, device, dtype)

    where = place.choose(config, model.stored if model else torch.bfloat16, lambda device, dtype: why_not(device, dtype) is None)
    for derived in where.derived:
        yield Finding("fast paths", derived.name, "fact", f"{derived.value} ({derived.reason})")
    yield from kernels()
    yield _native_step(model is not None, why_not(where.device, where.dtype))
    simd = torch.backends.cpu.get_cpu_capability()
    yield Finding("fast paths", "vector code", "off" if simd in ("DEFAULT", "NO AVX") else "on", f"PyTorch uses {simd}")
    yield from _choice(
        torch._C._has_mkldnn,
        "prepacked linear",
        ("oneDNN packs the weights once, at start-up", "this PyTorch has no oneDNN: weights are read unpacked"),
        "install a PyTorch wheel from PyPI; builds without oneDNN are rare",
    )
    yield from _choice(
        probe.native_bf16(),
        "native bf16",
        ("half the bytes per weight", "the CPU does not multiply bf16, so auto computes in fp32"),
        "nothing to do: fp32 is faster here than emulated bf16; processors with avx512_bf16 or amx_bf16 have it",
    )
    yield from _cuda()


def kernels() -> Iterator[Finding]:
    """The compiled CPU kernels: which variant runs here, and why not a better one."""
    from gemel.ops import hardware as probe
    from gemel.ops.cpu import native

    library, found = native.find()
    if library is None:
        why, _, mend = found.partition(": ")
        compiler = shutil.which(COMPILER)
        has = f"{compiler} is here" if compiler else f"there is no {COMPILER} on the PATH; CXX may name another"
        yield Finding("fast paths", "CPU kernels", "off", why, f"{mend} ({has})")
        return
    better = list(native.VARIANTS)[: list(native.VARIANTS).index(found)]
    missing = {name: [need for need in native.VARIANTS[name] if need not in probe.isa()] for name in better}
    lacks = [f"{name} needs {', '.join(needs)}" for name, needs in missing.items() if needs]
    yield Finding("fast paths", "CPU kernels", "on", "; ".join([found, *lacks]))
    for name in (name for name, needs in missing.items() if not needs):
        yield Finding("fast paths", f"{name} kernels", "off", "the processor could run them, but they were not compiled", REINSTALL)


def _native_step(known: bool, why_not: str | None) -> Finding:
    """Whether the default model runs as one native program."""
    if not known:
        return Finding("fast paths", "native step", "off", "not known before there is a model", "gemel pull")
    if why_not is None:
        return Finding("fast paths", "native step", "on", "the default model runs as one call per step")
    return Finding("fast paths", "native step", "off", f"the model runs in PyTorch: {why_not}", "see what is said of the CPU kernels")


def _default_model() -> Peek | None:
    """What the default model's files say, if they are here and whole."""
    from gemel.llm import store
    from gemel.model import build

    return build.peek(store.directory(store.DEFAULT)) if store.state(store.DEFAULT) is store.State.READY else None


def _choice(good: bool, name: str, values: tuple[str, str], advice: str) -> Iterator[Finding]:
    yield Finding("fast paths", name, "on" if good else "off", values[0 if good else 1], None if good else advice)


def _cuda() -> Iterator[Finding]:
    import torch

    from gemel.ops import triton

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size = f"{card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
            yield Finding("fast paths", f"cuda:{index}", "on", f"{card.name}, {size}")
            why_not = triton.why_not(torch.device("cuda", index))
            advice = f"{sys.executable} -m pip install triton" if why_not == triton.MISSING else "nothing to do: PyTorch's own serve"
            values = "Triton for the operations of training", f"the operations of training run in PyTorch: {why_not}"
            yield from _choice(why_not is None, f"cuda:{index} kernels", values, advice)
    elif torch.version.cuda is None:
        advice = "with an NVIDIA GPU, install a CUDA build of PyTorch"
        yield Finding("fast paths", "cuda", "off", "this PyTorch was built without CUDA", advice)
    else:
        advice = "with an NVIDIA GPU, see whether `nvidia-smi` lists it and whether its driver is new enough"
        yield Finding("fast paths", "cuda", "off", f"PyTorch was built for CUDA {torch.version.cuda}, but finds no device", advice)


def models() -> Iterator[Finding]:
    """The embedded models in the cache."""
    from gemel.llm import store

    for name in store.EMBEDDED:
        state, advice = store.state(name, thorough=True), f"gemel pull {name}"
        if state is store.State.READY:
            yield Finding("models", name, "on", str(store.directory(name)))
        elif state is store.State.ABSENT:
            yield Finding("models", name, "off", "not pulled yet", advice)
        else:
            yield Finding("models", name, "broken", f"damaged in {store.directory(name)}", advice)
