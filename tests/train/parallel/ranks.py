"""Several processes that work together, for the price of one start: a program of its own imports everything and then forks.

A program of ranks ends with `ranks.main(check, ...)`; a test starts it with `ranks.start(module, number)`, which fails if any rank does.
Forking is safe because the program computes nothing before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_S = 100.0


def start(module: str, num_ranks: int, *arguments: str) -> None:
    """Run `python -m module`; its output is shown if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", module, str(num_ranks), *arguments]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def main(*checks: Callable[[], None]) -> None:
    """In so many ranks as the command line says, one check after the other."""
    with tempfile.TemporaryDirectory() as folder:
        children = [os.fork() or _rank(rank, int(sys.argv[1]), Path(folder), checks) for rank in range(int(sys.argv[1]))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))


def _rank(rank: int, num_ranks: int, folder: Path, checks: tuple[Callable[[], None], ...]) -> int:
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(folder / "store"), num_ranks), rank=rank, world_size=num_ranks, timeout=timedelta(seconds=30)
        )
        for check in checks:
            check()
            dist.barrier()
        code = 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)
