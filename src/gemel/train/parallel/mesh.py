"""The processes of a run as a mesh: who computes what, and who talks to whom.

    mesh = join(recipe.parallel, device)        # one process: a mesh of one, and nothing of torch.distributed is set up
    mesh.tensor.rank, mesh.tensor.group         # this process's place along an axis, and those it shares that axis with
    mesh.tokens                                 # axes joined: all ranks with these parameters, which see other tokens

Axes, outermost first: pipeline (parts of the layers), replicate and shard (other sequences), context (parts of the same sequences), tensor
(parts of every product). Whatever cuts a model along an axis leaves the names of its parameters as they are, so that a name means the same
on every rank, in checkpoints and in patterns of the recipe.

Numbers that decide something (how many tokens are trained, norms, losses, whether somebody pressed Ctrl-C) are summed over all ranks by
`sum` before anybody looks at them; all ranks see the same bits and decide the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from gemel.config import env
from gemel.config.env import Place
from gemel.config.errors import ConfigError, RankError
from gemel.config.parallel import ParallelConfig
from gemel.train.parallel.watch import Watch, record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import DeviceMesh

JOINED = {"data": ("replicate", "shard"), "shards": ("shard", "context"), "tokens": ("replicate", "shard", "context")}
POLL_S = 0.1
LATER = 1.5  # times the time that a rank may hang: torch's own errors, which name nobody, should not come first


@dataclass(frozen=True)
class Axis:
    """A process's place along an axis or several joined ones. `group` is None where it is alone."""

    name: str
    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


class Mesh:
    """All axes. Made by `join`, or `Mesh()` for one process."""

    def __init__(
        self,
        config: ParallelConfig | None = None,
        devices: DeviceMesh | None = None,
        rank: int = 0,
        store: Store | None = None,
        watch: Watch | None = None,
    ):
        self.config = config or ParallelConfig()
        self.rank, self.num_ranks = rank, self.config.num_ranks
        self._devices, self._store, self._watch, self._num_turns = devices, store, watch, 0
        self.pipeline, self.replicate, self.shard, self.context, self.tensor = (
            Axis(name, *self._along((name,))) for name in self.config.sizes
        )
        self.data, self.shards, self.tokens = (Axis(name, *self._along(parts)) for name, parts in JOINED.items())

    def joined(self, *names: str) -> Axis:
        """Some axes as one, the last one's neighbours next to each other. All ranks must call it."""
        return Axis("_".join(names), *self._along(names))

    def _along(self, names: tuple[str, ...]) -> tuple[int, int, ProcessGroup | None]:
        size = math.prod(self.config.sizes[name] for name in names)
        if size == 1 or self._devices is None:
            return 0, size, None
        mesh = self.devices(*names)
        return mesh.get_local_rank(), size, mesh.get_group()

    def devices(self, *names: str) -> DeviceMesh:
        """The part of torch's mesh with this process in it along one axis, or along several as if they were one."""
        assert self._devices is not None, "one process has no mesh of devices"
        return self._devices[names]._flatten("_".join(names)) if len(names) > 1 else self._devices[names[0]]

    def hybrid(self) -> DeviceMesh:
        """Torch's mesh of copies, if there are several, and of the ranks within one that share parameters."""
        from torch.distributed.device_mesh import DeviceMesh

        assert self._devices is not None and self.shards.group is not None
        if self.replicate.group is None:
            return self.devices(*JOINED["shards"])
        groups, names = [self.replicate.group, self.shards.group], ("replicate", "shards")
        ranks = self._devices["replicate", "shard", "context"].mesh.reshape(self.replicate.size, -1)
        return DeviceMesh.from_group(groups, self._devices.device_type, ranks, mesh_dim_names=names)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each number over all ranks, in fp64; the same bits everywhere."""
        if self.num_ranks == 1:
            return list(values)
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        return self.sum([float(flag)])[0] > 0

    def from_first(self, value: Any) -> Any:
        """What rank 0 has, everywhere: numbers, texts, lists and tables."""
        if self.num_ranks == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 goes through the body first, the others when it is done, however long that takes; they find what it left on the disk."""
        self._num_turns += 1
        key = f"turn/{self._num_turns}"
        if self._store is not None and not self.first:
            while not self._store.check([key]):
                time.sleep(POLL_S)
        yield
        if self._store is not None and self.first:
            self._store.set(key, "done")

    def tell(self, key: str, text: str) -> None:
        """Leave word for the others. Any thread may, at any time: it is no exchange, and nobody has to listen."""
        if self._store is not None:
            self._store.set(key, text)

    def told(self, key: str) -> str | None:
        """The last word that somebody left, if there is one."""
        return bytes(self._store.get(key)).decode() if self._store is not None and self._store.check([key]) else None

    def at(self, where: str) -> None:
        """Say how far this process is, in case that others have to wait for it."""
        if self._watch is not None:
            self._watch.at(where)

    def __enter__(self) -> Self:
        if self._watch is not None:
            self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watch is None:
            return
        try:
            self._watch.__exit__(kind, error, trace)
        except RankError as verdict:
            record(verdict)
            raise
        if error is not None:
            record(error)
            return  # there may be nobody to say goodbye to
        import torch.distributed as dist

        dist.destroy_process_group()


def join(config: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh that this process belongs to; leave it by its end as a context. On CPUs, the ranks of a machine divide its cores.

    Raises `ConfigError` if it takes another number of processes than were started.
    """
    place = env.place()
    check(config, 1 if place is None else place.num_ranks)
    if place is None:
        return Mesh(config)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    timeout = timedelta(seconds=LATER * config.timeout_s)
    stores = [_store(place, timeout, number == 0) for number in range(2)]
    ours, watched = (dist.PrefixStore("gemel", store) for store in stores)  # type: ignore[attr-defined]
    backend, torchs = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", dist.PrefixStore("torch", stores[0])  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=torchs, rank=place.rank, world_size=place.num_ranks, timeout=timeout)
    devices = init_device_mesh(device.type, tuple(config.sizes.values()), mesh_dim_names=tuple(config.sizes))
    return Mesh(config, devices, place.rank, ours, Watch(watched, place.rank, place.num_ranks, config.timeout_s))


def _store(place: Place, timeout: timedelta, first: bool) -> Store:
    """Where ranks meet. Each has two ways to it, because who waits on one blocks it."""
    import torch.distributed as dist

    listens = first and place.rank == 0 and not place.hosted
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        place.host, place.port, place.num_ranks, is_master=listens, timeout=timeout, multi_tenant=True
    )
    return store


def check(config: ParallelConfig, num_ranks: int) -> None:
    """Refuse a number of processes that the mesh does not take, and say what would do."""
    if num_ranks == config.num_ranks:
        return
    sizes = " x ".join(f"{name} {size}" for name, size in config.sizes.items() if size > 1) or "no axis"
    takes = f"[parallel] ({sizes}) takes {_processes(config.num_ranks)}, {_processes(num_ranks)} started"
    ways_out = [f"start {config.num_ranks} with gemel launch RECIPE" if config.num_ranks > 1 else "start one with gemel train RECIPE"]
    rest = config.num_ranks // config.replicate
    if num_ranks == 1:
        ways_out.append("leave out [parallel]")
    elif num_ranks % rest == 0:
        ways_out.append(f"set parallel.replicate = {num_ranks // rest}")
    else:
        ways_out.append(f"start {-(-num_ranks // rest) * rest} and set parallel.replicate = {-(-num_ranks // rest)}")
    raise ConfigError(f"{takes}; {', or '.join(ways_out)}")


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
