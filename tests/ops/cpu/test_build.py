"""Installing where there is no compiler: it succeeds, and says what is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.cpu.conftest import ROOT


def test_an_install_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="installing takes setuptools, which pip brings itself")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    command = [sys.executable, "setup.py", "build_py", "--build-lib", "lib"]
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning: CPU kernels 'generic' were not compiled (no-such-compiler: No such file or directory)" in done.stdout
    assert (tmp_path / "lib/gemel/ops/cpu/native.py").exists()
    assert not list(tmp_path.rglob("*.so"))
