"""Compile the CPU kernels, once per instruction set, with the system's C++ compiler.

The libraries have a plain C interface and know nothing of Python, so this is not a Python extension: any interpreter loads them, and all
variants of an architecture can lie in one wheel. Without a compiler the install succeeds and says what is lost; torch does the work then.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
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


def compile_all(variants: Mapping[str, str], target: Path) -> dict[str, str]:
    """Compile the libraries that are not newer than their sources, every file on its own, to use all cores; of those that failed, why."""
    target.mkdir(parents=True, exist_ok=True)
    changed = max(path.stat().st_mtime for path in [Path(__file__), *SOURCES.glob("*.[ch]*")])
    reasons = {}
    with tempfile.TemporaryDirectory() as drafts, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {}
        for name, flags in variants.items():
            if not (library := target / f"{name}.so").exists() or library.stat().st_mtime < changed:
                objects = {Path(drafts) / f"{name}.{source.stem}.o": source for source in SOURCES.glob("*.cpp")}
                jobs[name] = {made: pool.submit(_compile, flags, ["-c", source], made) for made, source in objects.items()}
        for name, made in jobs.items():
            draft = target / f".{name}.{os.getpid()}.so"
            failed = next(filter(None, (job.result() for job in made.values())), None)
            if reason := failed or _compile(variants[name], made, draft):
                reasons[name] = reason
            else:
                draft.replace(target / f"{name}.so")  # never half a library, and never under the feet of a process that has it loaded
    return reasons


def _compile(flags: str, inputs: Iterable[str | Path], made: Path) -> str | None:
    """Run the compiler; the reason if it failed."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        done = subprocess.run(
            [*compiler, *COMMON.split(), *flags.split(), *map(str, inputs), "-o", str(made)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"{compiler[0]}: {error.strerror}"
    if done.returncode:
        return next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
    return None


class Build(build_py):
    """The usual build, and the kernels beside their sources' package."""

    def run(self) -> None:
        """Copy what is Python, then compile what is not."""
        super().run()
        target = SOURCES if self.editable_mode else Path(self.build_lib) / "gemel/ops/cpu"
        variants = VARIANTS.get(platform.machine(), {"generic": ""})
        for name, reason in compile_all(variants, target).items():
            print(f"warning: CPU kernels {name!r} were not compiled ({reason}); without any, steps run several times slower in torch")


class Native(Distribution):
    """Says that the wheel belongs to one platform."""

    def has_ext_modules(self) -> bool:
        """Whether there is compiled code."""
        return True


setup(cmdclass={"build_py": Build}, distclass=Native)
