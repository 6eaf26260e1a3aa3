"""Compile the CPU kernels, once per instruction set, with the system's C++ compiler.

The libraries have a plain C interface and know nothing of Python, so this is not a Python extension: any interpreter loads them, and all
variants of an architecture can lie in one wheel. Without a compiler the install succeeds and says what is lost; torch does the work then.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

SOURCES = Path("src/gemel/ops/cpu")
COMMON = "-std=c++17 -O3 -fPIC -shared -pthread -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
VARIANTS = {
    "x86_64": {
        "generic": "-march=x86-64",
        "avx2": "-march=x86-64-v3",
        "avx512": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni",
    },
    "aarch64": {"generic": "-march=armv8-a"},
}
VARIANTS["AMD64"], VARIANTS["arm64"] = VARIANTS["x86_64"], VARIANTS["aarch64"]


def compile_variant(name: str, flags: str, target: Path) -> str | None:
    """Compile one library, unless it is newer than its sources; the reason if that failed."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    target.mkdir(parents=True, exist_ok=True)
    made, library = target / f".{name}.{os.getpid()}.so", target / f"{name}.so"
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in [Path(__file__), *SOURCES.glob("*.[ch]*")]):
        return None
    command = [*compiler, *COMMON.split(), *flags.split(), *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{compiler[0]}: {error.strerror}"
    if done.returncode:
        return next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
    made.replace(library)  # never half a library, and never under the feet of a process that has it loaded
    return None


class Build(build_py):
    """The usual build, and the kernels beside their sources' package."""

    def run(self) -> None:
        """Copy what is Python, then compile what is not."""
        super().run()
        target = SOURCES if self.editable_mode else Path(self.build_lib) / "gemel/ops/cpu"
        variants = VARIANTS.get(platform.machine(), {"generic": ""})
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = dict(zip(variants, pool.map(lambda item: compile_variant(*item, target), variants.items()), strict=True))
        for name, reason in reasons.items():
            if reason:
                print(f"warning: CPU kernels {name!r} were not compiled ({reason}); without any, steps run several times slower in torch")


class Native(Distribution):
    """Says that the wheel belongs to one platform."""

    def has_ext_modules(self) -> bool:
        """Whether there is compiled code."""
        return True


setup(cmdclass={"build_py": Build}, distclass=Native)
