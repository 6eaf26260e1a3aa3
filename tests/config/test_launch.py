"""How many processes a mesh is given, and what schedulers are given: files that are run here, with stand-ins for the schedulers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemel.config.errors import ConfigError
from gemel.config.launch import PORT, LaunchConfig, ray, slurm, spread, torchrun
from gemel.config.parallel import ParallelConfig

MESH = ParallelConfig.parse({"replicate": 2, "tensor": 2})
TRAIN = ["my recipe.toml", "--set", 'model.kind="new"']


def test_the_mesh_says_how_many_processes_there_are() -> None:
    assert spread(MESH, None, 1) == (4, 1) and spread(MESH, None, 2) == (2, 2) and spread(MESH, 1, 4) == (1, 4)
    assert spread(ParallelConfig(), None, 1) == (1, 1)


@pytest.mark.parametrize(
    ("nproc", "nodes", "says"),
    [
        (3, 1, r"\(replicate 2 x tensor 2\) takes 4 processes, --nproc 3 would start 3; leave --nproc out"),
        (4, 2, r"--nproc 4 on each of --nodes 2 would start 8; leave --nproc out, or --set parallel.replicate=4"),
        (None, 3, r"do not divide over --nodes 3; numbers that do: 1, 2, 4"),
        (1, 3, r"would start 3; start 4"),
    ],
)
def test_another_number_is_refused(nproc: int | None, nodes: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        spread(MESH, nproc, nodes)


def test_the_ways_out_work() -> None:
    assert spread(ParallelConfig.parse({"replicate": 4, "tensor": 2}), 4, 2) == (4, 2)
    assert spread(MESH, None, 4) == (1, 4)


def test_torchrun_passes_on_what_train_gets() -> None:
    assert torchrun(LaunchConfig(nproc=4), "torchrun", TRAIN) == [
        *("torchrun", "--standalone", "--nproc-per-node=4", "-m", "gemel", "train", "my recipe.toml", "--set", 'model.kind="new"')
    ]


def test_a_slurm_file_runs_torchrun_on_every_machine(tmp_path: Path) -> None:
    """bash runs it, with an srun and an scontrol that only write down what they are asked."""
    tools, folder = tmp_path / "bin", tmp_path / "a folder"
    tools.mkdir()
    folder.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tools / "srun").write_text(
        f'#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), os.environ["THREADS"], *sys.argv[1:]]))\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = LaunchConfig(nproc=8, nodes=2, gpus=8, cpus=64, time="1:00:00", partition="big", account="us", name="seven")
    text = slurm(job, "/opt/my env/torchrun", TRAIN, str(folder), {"THREADS": "8"})
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert asked == [
        *("job-name=seven", "nodes=2", "ntasks-per-node=1", "cpus-per-task=64", "gpus-per-node=8", "time=1:00:00", "partition=big"),
        *("account=us", "signal=TERM@120"),
    ]
    (tmp_path / "job.sbatch").write_text(text)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "99"}
    done = subprocess.run(["bash", str(tmp_path / "job.sbatch")], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        *(str(folder), "8", "--kill-on-bad-exit=1", "--cpus-per-task=64", "/opt/my env/torchrun", "--nnodes=2", "--nproc-per-node=8"),
        *("--rdzv-id=99", "--rdzv-backend=c10d", f"--rdzv-endpoint=node7:{PORT + 99}", "-m", "gemel", "train", *TRAIN),
    ]


def test_a_slurm_file_asks_only_for_what_was_said() -> None:
    text = slurm(LaunchConfig(nproc=1, nodes=2), "torchrun", TRAIN, "/tmp", {})
    assert [line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")] == [
        *("#SBATCH --job-name", "#SBATCH --nodes", "#SBATCH --ntasks-per-node", "#SBATCH --cpus-per-task")
    ]


def test_a_ray_program_runs_torchrun_in_every_bundle(tmp_path: Path) -> None:
    """Run with a stand-in for ray that runs tasks as they come, and a torchrun that writes down what it is asked."""
    modules = tmp_path / "modules"
    util = modules / "ray" / "util"
    util.mkdir(parents=True)
    (modules / "ray" / "__init__.py").write_text(STAND_IN)
    (util / "__init__.py").write_text("def get_node_ip_address(): return '10.0.0.7'\n")
    (util / "placement_group.py").write_text(
        "def placement_group(bundles, strategy):\n    import ray\n    ray.asked = (bundles, strategy)\n    return ray.Group()\n"
    )
    (util / "scheduling_strategies.py").write_text(
        "def PlacementGroupSchedulingStrategy(group, placement_group_bundle_index): return placement_group_bundle_index\n"
    )
    runner = modules / "torch" / "distributed"
    runner.mkdir(parents=True)
    (modules / "torch" / "__init__.py").write_text("")
    (runner / "__init__.py").write_text("")
    (runner / "run.py").write_text(
        "import json, os, sys\nprint(json.dumps([os.getcwd(), os.environ['THREADS'], *sys.argv[1:]]), flush=True)\n"
    )
    job = LaunchConfig(nproc=4, nodes=2, cpus=8, gpus=4)
    path = tmp_path / "job.py"
    path.write_text(ray(job, TRAIN, str(tmp_path), {"THREADS": "2", "PYTHONPATH": str(modules)}, "ray job submit -- python job.py"))
    done = subprocess.run([sys.executable, path], env={"PYTHONPATH": str(modules)}, capture_output=True, text=True, check=True)
    first, second, asked = map(json.loads, done.stdout.splitlines())
    assert asked == [[[{"CPU": 8, "GPU": 4}] * 2, "STRICT_SPREAD"], {"num_cpus": 8, "num_gpus": 4, "max_retries": 0}]
    assert first[2:5] == ["--nnodes=2", "--node-rank=0", "--nproc-per-node=4"] and second[3] == "--node-rank=1"
    assert first[5] == "--master-addr=10.0.0.7" and first[6] == second[6] and int(first[6].split("=")[1]) > 0
    assert first[:2] == [str(tmp_path), "2"] and shlex.join(first[7:]) == shlex.join(["-m", "gemel", "train", *TRAIN])


STAND_IN = """
import atexit, json
asked = options_seen = None
atexit.register(lambda: print(json.dumps([asked, options_seen])))

class Group:
    def ready(self): return None

class Task:
    def __init__(self, work): self.work = work
    def options(self, scheduling_strategy, **options):
        global options_seen
        options_seen = options
        return self
    def remote(self, *args): return self.work(*args)

def init(address): assert address == "auto"
def remote(work): return Task(work)
def get(result): return result
"""
