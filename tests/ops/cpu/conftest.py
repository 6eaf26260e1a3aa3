"""The kernels for each instruction set, compiled into a temporary folder: natively, or with AVX-512 emulated where the processor has none.

Only the sources that a test names are compiled, with the flags of setup.py.
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gemel.ops import hardware
from gemel.ops.cpu import native

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "src/gemel/ops/cpu"
SIMDE = Path("/usr/include/simde/x86/avx512.h")
EMULATED = "-DGEMEL_EMULATE_AVX512 -march=x86-64-v3 -Wno-psabi -O1"  # more optimization takes longer than the tests do without it

OpenKernels = Callable[[str, Sequence[str], Sequence[str]], ctypes.CDLL]


def _flags(variant: str) -> str:
    """What to compile a variant with on this machine; skips the test where that can neither run nor be emulated."""
    build = {}  # what setup.py assigns; importing it would build
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("COMMON", "VARIANTS"):
            build[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    variants, have = build["VARIANTS"].get(platform.machine(), {"generic": ""}), set(hardware.isa())
    if variant not in variants:
        pytest.skip(f"no {variant} on {platform.machine()}")
    if have.issuperset(native.VARIANTS[variant]):
        return f"{build['COMMON']} {variants[variant]}"
    if variant != "avx512" or not have.issuperset(native.VARIANTS["avx2"]):
        pytest.skip(f"this processor does not run {variant} code")
    if not SIMDE.exists():
        pytest.skip(f"emulating AVX-512 takes SIMDe, and {SIMDE} is not there: apt install libsimde-dev")
    return f"{build['COMMON']} {EMULATED}"


@pytest.fixture(scope="session")
def open_kernels(tmp_path_factory: pytest.TempPathFactory) -> OpenKernels:
    """open_kernels(variant, sources, names): a library of these sources, compiled once, with the functions of these names declared."""
    compiled: dict[tuple[str, ...], Path] = {}

    def opened(variant: str, sources: Sequence[str], names: Sequence[str]) -> ctypes.CDLL:
        key = (variant, *sources)
        if key not in compiled:
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            if shutil.which(compiler[0]) is None:
                pytest.skip(f"there is no C++ compiler named {compiler[0]}")
            library = tmp_path_factory.mktemp(variant) / "kernels.so"
            command = [*compiler, *_flags(variant).split(), *(str(SOURCES / name) for name in sources), "-o", str(library)]
            subprocess.run(command, check=True)
            compiled[key] = library
        return native.open_library(compiled[key], names)

    return opened
