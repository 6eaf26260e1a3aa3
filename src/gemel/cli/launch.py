"""`gemel launch recipe.toml`: `gemel train` in as many processes as the recipe's [parallel] takes, here or through a scheduler.

torchrun starts the processes and watches them. Ctrl-C goes to each of them once, past torchrun, which would take it for a reason to kill
them: they finish the step, save together, and end. A second one does not let them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemel.config.launch import LaunchConfig

HELP = "train in many processes, on one machine or many"
EXAMPLE = """gemel launch recipes/tiny_pretrain.toml --set parallel.replicate=2
gemel launch recipes/tiny_pretrain.toml --set parallel.replicate=2 --print
gemel launch recipes/tiny_pretrain.toml --set parallel.replicate=8 --nodes 2 --gpus 4 --time 12:00:00 --slurm job.sbatch"""

INTERRUPTED = 128 + signal.SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file whose [parallel] says how many processes there are")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="as gemel train; may be repeated")
    parser.add_argument("--output", metavar="DIR", help="folder of the run; a run that is there goes on (default: the recipe's out)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on each machine (default: what [parallel] takes)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1); more need --slurm or --ray")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--print", action="store_true", dest="show", help="print the torchrun command instead of running it")
    do.add_argument("--slurm", type=Path, metavar="FILE", help="write a job file for sbatch instead")
    do.add_argument("--ray", type=Path, metavar="FILE", help="write a program for ray job submit instead")
    group = parser.add_argument_group("what a scheduler is asked for")
    group.add_argument("--gpus", type=int, default=argparse.SUPPRESS, metavar="N", help="GPUs of each machine (default: none)")
    group.add_argument("--cpus", type=int, default=argparse.SUPPRESS, metavar="N", help="cores of each machine (default: one per process)")
    group.add_argument("--time", default=argparse.SUPPRESS, metavar="HH:MM:SS", help="that the job may take (default: its own)")
    group.add_argument("--partition", default=argparse.SUPPRESS, metavar="NAME", help="of the cluster (default: its own)")
    group.add_argument("--account", default=argparse.SUPPRESS, metavar="NAME", help="that pays (default: its own)")
    group.add_argument("--name", default=argparse.SUPPRESS, help="of the job (default: gemel)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the command or file, or what gemel train --json prints")


def run(args: argparse.Namespace) -> int:
    """Start the job, or write down how to."""
    from gemel.config import launch as config
    from gemel.config import train as recipes
    from gemel.config.errors import ConfigError

    recipe = recipes.load(args.recipe, args.settings)
    for name in ("nproc", "nodes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(
                f"--{name} {getattr(args, name)} is no number of {'processes' if name == 'nproc' else 'machines'}; give 1 or more"
            )
    nproc, nodes = config.spread(recipe.parallel, args.nproc, args.nodes)
    asked = {name: getattr(args, name) for name in ("gpus", "cpus", "time", "partition", "account", "name") if hasattr(args, name)}
    job = config.LaunchConfig.parse({"nproc": nproc, "nodes": nodes} | asked)
    train = _train_arguments(args)
    if args.slurm or args.ray:
        return _write(args, job, train, _environment(job, recipe.threads, job.num_cpus))
    if asked:
        raise ConfigError(f"--{next(iter(asked))} is for a scheduler; add --slurm FILE or --ray FILE, or leave it out")
    if nodes > 1:
        raise ConfigError(f"--nodes {nodes} are not started from here; write a job with --slurm FILE or --ray FILE and submit that")
    command = config.torchrun(job, _program(shown=True), train)
    environment = _environment(job, recipe.threads, len(os.sched_getaffinity(0)))
    if args.show:
        prefix = [f"{name}={value}" for name, value in environment.items()]
        shown = {"command": command, "environment": environment, "nproc": nproc, "nodes": nodes}
        print(json.dumps(shown) if args.json else shlex.join([*prefix, *command]))
        return 0
    if not args.quiet:
        print(shlex.join(command), file=sys.stderr)
    return supervise(command, os.environ | environment)


def _train_arguments(args: argparse.Namespace) -> list[str]:
    """What each process is given."""
    arguments = [str(args.recipe)]
    for setting in args.settings:
        arguments += ["--set", setting]
    if args.output:
        arguments += ["--output", args.output]
    return arguments + ["--quiet"] * args.quiet + ["--json"] * (args.json and not (args.slurm or args.ray or args.show))


def _program(shown: bool = False) -> str:
    """The torchrun of this Python; `shown` to a person as short as it can be."""
    ours = Path(sys.executable).with_name("torchrun")
    return "torchrun" if shown and shutil.which("torchrun") == str(ours) else str(ours)


def _environment(job: LaunchConfig, threads: int | None, cores: int) -> dict[str, str]:
    """Cores are divided among the processes: torchrun would give each a single thread, and torch alone all of them to each."""
    from gemel.config.launch import GRACE_S

    share = threads or max(cores // job.nproc, 1)
    grace = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S)}
    return ({} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}) | grace


def _write(args: argparse.Namespace, job: LaunchConfig, train: list[str], environment: dict[str, str]) -> int:
    """Write the file of a scheduler, and say how it is submitted."""
    from gemel.config import launch as config
    from gemel.config.errors import ConfigError

    folder = str(Path.cwd())
    if args.slurm:
        path, text, submit = args.slurm, config.slurm(job, _program(), train, folder, environment), f"sbatch {shlex.quote(str(args.slurm))}"
    else:
        submit = f"ray job submit -- python {shlex.quote(str(args.ray.resolve()))}"
        path, text = args.ray, config.ray(job, train, folder, environment, submit)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from None
    found = {"file": str(path), "submit": submit, "nproc": job.nproc, "nodes": job.nodes}
    what = "1 process" if job.nproc == 1 else f"{job.nproc} processes"
    where = "1 machine" if job.nodes == 1 else f"each of {job.nodes} machines"
    print(json.dumps(found) if args.json else f"{path} starts {what} on {where}; submit it with: {submit}")
    return 0


def supervise(command: list[str], environment: dict[str, str]) -> int:
    """Run torchrun until it ends. Its session is its own, so that a terminal's Ctrl-C comes here alone and is passed on from here."""
    import psutil

    signals: list[int] = []
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            signals.append(number)
            ranks = psutil.Process(process.pid).children() if process.poll() is None else []
            if len(signals) > 2 or not ranks:
                process.terminate()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if signals:
        return INTERRUPTED
    return 1 if status else 0
