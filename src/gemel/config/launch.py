"""A job of many processes: how many, on how many machines, and what a scheduler is asked for.

Every process runs the same `gemel train`; torchrun starts them, tells each its number, and ends all when one fails. So a job is a torchrun
command on each machine, and this is where that command and the files that schedulers take are written. No torch, no running.
"""

from __future__ import annotations

import json
import shlex
from typing import Annotated

from pydantic import Field, PositiveInt

from gemel.config.base import Config
from gemel.config.errors import ConfigError
from gemel.config.parallel import ParallelConfig

PORT = 29500  # where the processes of several machines find each other: this, and up to PORTS more by the number of the job,
PORTS = 1000  # because another job may have the same first machine
GRACE_S = 600  # that processes have to save before they are killed; torchrun's own 30 are few for a large model


class LaunchConfig(Config):
    """Processes and machines.

    nproc      processes on each machine, one per GPU
    nodes      machines
    cpus       cores of each machine that a scheduler is asked for; None asks for one per process, for a scheduler's own default may be one
    gpus       GPUs of each machine that it is asked for
    time       that the job may take, as 12:00:00 or whatever the scheduler understands; a checkpoint is saved two minutes before its end
    partition  of the cluster
    account    that pays
    name       of the job
    """

    nproc: PositiveInt
    nodes: PositiveInt = 1
    cpus: PositiveInt | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    name: str = "gemel"

    @property
    def num_cpus(self) -> int:
        """Cores of each machine that are asked for."""
        return self.cpus or self.nproc


def spread(parallel: ParallelConfig, nproc: int | None, nodes: int) -> tuple[int, int]:
    """Processes per machine and machines, as asked for or as the mesh needs. Raises `ConfigError` if the mesh takes another number."""
    need = parallel.num_ranks
    axes = " x ".join(f"{name} {size}" for name, size in parallel.sizes.items() if size > 1) or "no axis"
    mesh = f"[parallel] ({axes}) takes {need} {_processes(need)}"
    if nproc is None:
        if need % nodes:
            fits = ", ".join(str(n) for n in range(1, need + 1) if need % n == 0)
            raise ConfigError(f"{mesh}, which do not divide over --nodes {nodes}; numbers that do: {fits}")
        return need // nodes, nodes
    if nproc * nodes == need:
        return nproc, nodes
    rest = need // parallel.replicate
    ways_out = ["leave --nproc out"] if need % nodes == 0 else []
    if nproc * nodes % rest == 0:
        ways_out.append(f"--set parallel.replicate={nproc * nodes // rest}")
    elif not ways_out:
        ways_out.append(f"start {need}")
    started = f"--nproc {nproc}" + (f" on each of --nodes {nodes}" if nodes > 1 else "")
    raise ConfigError(f"{mesh}, {started} would start {nproc * nodes}; {', or '.join(ways_out)}")


def _processes(count: int) -> str:
    return "process" if count == 1 else "processes"


def torchrun(config: LaunchConfig, program: str, train: list[str]) -> list[str]:
    """The command for one machine that is all there is."""
    return [program, "--standalone", f"--nproc-per-node={config.nproc}", "-m", "gemel", "train", *train]


def slurm(config: LaunchConfig, program: str, train: list[str], folder: str, environment: dict[str, str]) -> str:
    """A file for sbatch. Torchruns of all machines meet at the first one."""
    asked = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": config.num_cpus,
        "gpus-per-node": config.gpus or None,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "signal": "TERM@120" if config.time else None,
    }
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None),
        "",
        "# Every machine runs torchrun, which starts one process per GPU or part of its cores. The same file submitted again goes on from",
        "# the last checkpoint.",
        "set -euo pipefail",
        f"cd {shlex.quote(folder)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        f"port=$(({PORT} + SLURM_JOB_ID % {PORTS}))",
        "# srun does not take the number of cores over from the lines above by itself.",
        f"srun --kill-on-bad-exit=1 --cpus-per-task={config.num_cpus} {shlex.quote(program)} \\",
        f'    --nnodes="$SLURM_NNODES" --nproc-per-node={config.nproc} \\',
        '    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \\',
        "    -m gemel train " + shlex.join(train),
    ]
    return "\n".join(lines) + "\n"


_RAY = '''"""A training job on a Ray cluster: {nodes} machines with {nproc} processes each.

    {submit}

Ray only decides which machines; on each of them torchrun starts the processes, in a folder that all machines must share. The same file run
again goes on from the last checkpoint.
"""

import os
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODES, NPROC = {nodes}, {nproc}
RESOURCES = {resources}  # of each machine
FOLDER = {folder}
ENVIRONMENT = {environment}
TRAIN = {train}


def address():
    """Of the first machine, with a port that is free there."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def torchrun(node, host, port):
    """All processes of one machine."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={{NODES}}", f"--node-rank={{node}}", f"--nproc-per-node={{NPROC}}"]
    command += [f"--master-addr={{host}}", f"--master-port={{port}}", "-m", "gemel", "train", *TRAIN]
    with subprocess.Popen(command, cwd=FOLDER, env={{**os.environ, **ENVIRONMENT}}) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # what a cancelled task gets; torchrun lets its processes save
            process.terminate()
            status = process.wait()
    if status:
        raise SystemExit(f"torchrun of machine {{node}} ended with status {{status}}")


def main():
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"))
    group = placement_group([RESOURCES] * NODES, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(node, work):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        options = {{"num_cpus": RESOURCES["CPU"], "num_gpus": RESOURCES.get("GPU", 0), "max_retries": 0, "scheduling_strategy": place}}
        return ray.remote(work).options(**options)

    host, port = ray.get(on(0, address).remote())
    running = [on(node, torchrun).remote(node, host, port) for node in range(NODES)]
    try:
        ray.get(running)
    except KeyboardInterrupt:
        for one in running:
            ray.cancel(one)
        ray.wait(running, num_returns=NODES)


if __name__ == "__main__":
    main()
'''


def ray(config: LaunchConfig, train: list[str], folder: str, environment: dict[str, str], submit: str) -> str:
    """A program for `ray job submit`: one placement group with a bundle on each machine, and torchrun in each bundle."""
    resources = {"CPU": config.num_cpus} | ({"GPU": config.gpus} if config.gpus else {})
    return _RAY.format(
        nodes=config.nodes,
        nproc=config.nproc,
        resources=json.dumps(resources),
        folder=json.dumps(folder),
        environment=json.dumps(environment),
        train=json.dumps(train),
        submit=submit,
    )
