"""Tensors that live elsewhere and come when they are needed: optimizer state and the blocks' parameters, in the CPU's memory or on a disk.

What is needed next is known long before: an optimizer walks over parameters in their order, a model over its blocks, there and back. So
whoever walks says what comes next (`ahead`), waits for what is now (`fetch`) and gives up what was (`behind`), and while one is worked on
the next is read and the last is written (Ren et al. 2021, arXiv 2101.06840; Rajbhandari et al. 2021, arXiv 2104.07857). All arithmetic is
done where it would be done otherwise, in the same order, so no bit of a result depends on where things live.

    Disk     files mapped into memory. What the CPU computes with is the mapping itself: nothing is copied, nothing has to be written back,
             and memory that nobody else wants still serves as cache, for the operating system may drop these pages but need not.
    Remote   the device has a tensor's memory only between `ahead` and `behind`; at home it lies in the CPU's memory, or on a disk.

The files have no names from the moment they are there: however a process ends, they end with it. The truth is in the checkpoints.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from gemel.config.compute import OffloadConfig, Resident, ToDisk, ToMemory
from gemel.config.errors import ConfigError, UnsupportedError
from gemel.model.attend import Attend
from gemel.model.attention import Rotation
from gemel.model.model import Model

Forward = Callable[[Tensor, Rotation | None, Attend], Tensor]
Part = tuple[float, float]  # of each of some tensors: from where to where, as shares of its length
WHOLE: Part = (0.0, 1.0)
_POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14: pages come at once instead of one by one as they are touched
_MOST_HINTS = 8  # that wait: who is further ahead than that waits too, or memory would fill with what is not needed yet


class Home(Protocol):
    """Where tensors live. All but `allocate` accept tensors of others, and leave them alone."""

    def allocate(self, name: str, num: int, dtype: torch.dtype) -> Tensor:
        """Zeros. `name` is for messages."""
        ...

    def ahead(self, tensors: Iterable[Tensor], part: Part = WHOLE) -> None:
        """These tensors, or a part of each, will be needed soon."""
        ...

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """They are needed now."""
        ...

    def behind(self, tensors: Iterable[Tensor], changed: bool, part: Part = WHOLE) -> None:
        """They are not needed for a while, up to the end of that part."""
        ...

    def at_home(self, tensor: Tensor) -> Tensor:
        """What a tensor holds, where it lives: to be saved, or to be written to while it is not elsewhere."""
        ...


class Disk:
    """Files in a folder, mapped. On Linux only. Errors: `UnsupportedError` elsewhere, `ConfigError` if the disk is too small."""

    def __init__(self, folder: Path):
        if sys.platform != "linux":
            raise UnsupportedError(f"offload to disk is built for Linux, this is {sys.platform}; leave [offload] out")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._starts: set[int] = set()  # of all mappings
        self._advise = ctypes.CDLL(None, use_errno=True).madvise  # which lets other threads run, as the module mmap's does not
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._thread = ThreadPoolExecutor(1, "offload")
        self._hints: deque[Future[None]] = deque()

    def allocate(self, name: str, num: int, dtype: torch.dtype) -> Tensor:
        """See `Home.allocate`."""
        if not num:
            return torch.zeros(0, dtype=dtype)
        num_bytes = num * dtype.itemsize
        descriptor, path = tempfile.mkstemp(dir=self._folder)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # a mapped file that outgrows the disk would kill the process
            tensor = torch.from_file(path, shared=True, size=num, dtype=dtype)
        except OSError as error:
            raise ConfigError(
                f"{self._folder} has no room for {num_bytes:,} bytes of {name}: {error.strerror}; name another folder in [offload]"
            ) from None
        finally:
            os.close(descriptor)
            Path(path).unlink()
        self._starts.add(tensor.data_ptr())
        return tensor

    def ahead(self, tensors: Iterable[Tensor], part: Part = WHOLE) -> None:
        """See `Home.ahead`."""
        self._hint(tensors, part, _POPULATE_WRITE)

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """Nothing: what is not there yet comes when it is touched."""

    def behind(self, tensors: Iterable[Tensor], changed: bool, part: Part = WHOLE) -> None:  # noqa: ARG002
        """See `Home.behind`. The operating system writes what was changed when it likes."""
        self._hint(tensors, part, mmap.MADV_DONTNEED)

    def at_home(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def __deepcopy__(self, memo: object) -> Disk:
        """A copy of a model lives where the model does."""
        return self

    def _hint(self, tensors: Iterable[Tensor], part: Part, advice: int) -> None:
        mine = [tensor for tensor in tensors if tensor.numel() and tensor.untyped_storage().data_ptr() in self._starts]
        if not mine:
            return
        self._hints.append(self._thread.submit(self._give, mine, part, advice))
        if len(self._hints) > _MOST_HINTS:
            self._hints.popleft().result()

    def _give(self, tensors: Sequence[Tensor], part: Part, advice: int) -> None:
        """That a kernel does not know an advice costs time at most, so nobody looks at what it says.

        The tensors are held here until it is done: memory that was given back in between could be somebody else's.
        """
        for tensor in tensors:
            start, stop = (tensor.data_ptr() + int(share * tensor.nbytes) for share in part)
            start = start // mmap.PAGESIZE * mmap.PAGESIZE  # what is given up with a neighbour comes back when it is touched
            self._advise(start, stop - start, advice)


class _Lane:
    """A queue of copies beside the device's own work. A CPU has none, and copies at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Begin a copy of what is there when the device's present work is done; what tells of its end."""
        if self._stream is None:
            to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the device's further work wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


@dataclass(slots=True, eq=False)
class _Guest:
    """A tensor of the device and what it is at home. `event` is the end of the copy that is on its way."""

    tensor: Tensor
    home: Tensor
    present: bool = True
    event: torch.cuda.Event | None = None


class Remote:
    """Tensors of a device that live in memory which `home` gives (or in the CPU's, if None), and visit the device."""

    def __init__(self, device: torch.device, home: Disk | None = None):
        self._device, self._below = device, home
        self._lane = _Lane(device)
        self._guests: dict[int, _Guest] = {}  # by their storage, which views share
        self._leaving: list[_Guest] = []

    def allocate(self, name: str, num: int, dtype: torch.dtype) -> Tensor:
        """See `Home.allocate`. The tensor is on the device until it is given up."""
        if self._below is not None:
            home = self._below.allocate(name, num, dtype)
        else:
            home = torch.zeros(num, dtype=dtype, pin_memory=self._device.type == "cuda")
        tensor = torch.zeros(num, dtype=dtype, device=self._device)
        self._guests[tensor.untyped_storage()._cdata] = _Guest(tensor, home)
        return tensor

    def ahead(self, tensors: Iterable[Tensor], part: Part = WHOLE) -> None:  # noqa: ARG002
        """See `Home.ahead`. Parts bring the whole."""
        for guest in self._mine(tensors):
            if guest.present:
                continue
            if guest in self._leaving:
                self._let_go()
            guest.tensor.untyped_storage().resize_(guest.home.nbytes)
            with torch.no_grad(), _unsafe_preserve_version_counter(guest.tensor):  # it holds what it held
                guest.event = self._lane.copy(guest.tensor, guest.home)
            guest.present = True

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """See `Home.fetch`."""
        tensors = list(tensors)
        self.ahead(tensors)
        for guest in self._mine(tensors):
            self._lane.wait(guest.event)
            guest.event = None

    def behind(self, tensors: Iterable[Tensor], changed: bool, part: Part = WHOLE) -> None:
        """See `Home.behind`. Memory of what goes home is free when the next follows it, so that nobody waits for the copy."""
        if part[1] < 1:
            return
        self._let_go()
        for guest in self._mine(tensors):
            if not guest.present:
                continue
            self._lane.wait(guest.event)
            guest.event = self._lane.copy(guest.home, guest.tensor.detach()) if changed else None
            guest.present = False
            self._leaving.append(guest)
        if not changed:
            self._let_go()

    def at_home(self, tensor: Tensor) -> Tensor:
        """See `Home.at_home`."""
        found = self._guests.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        if found.present:
            self._lane.copy(found.home, found.tensor.detach())
        self._lane.finish()
        return found.home.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def __deepcopy__(self, memo: object) -> Remote:
        """A copy of a model lives where the model does."""
        return self

    def _let_go(self) -> None:
        for guest in self._leaving:
            self._lane.wait(guest.event)
            guest.event = None
            guest.tensor.untyped_storage().resize_(0)
            if self._below is not None:
                self._below.behind([guest.home], changed=True)
        self._leaving.clear()

    def _mine(self, tensors: Iterable[Tensor]) -> list[_Guest]:
        found = {key: self._guests[key] for tensor in tensors if (key := tensor.untyped_storage()._cdata) in self._guests}
        return list(found.values())


@dataclass(frozen=True)
class Homes:
    """Where the optimizer's state and the blocks' parameters live; None is where they are used."""

    optimizer: Home | None = None
    parameters: Home | None = None

    @classmethod
    def of(cls, config: OffloadConfig, device: torch.device, folder: Path) -> Homes:
        """As a recipe says. `folder` is where files go if it does not."""
        return cls(
            _home("optimizer", config.optimizer, device, folder),
            _home("parameters", config.parameters, device, folder),
        )

    @property
    def all(self) -> list[Home]:
        """Those that there are."""
        return [home for home in (self.optimizer, self.parameters) if home is not None]

    def place(self, model: Model, device: torch.device) -> Model:
        """A model on a device, the parameters of its blocks at home. They stay the parameters that they are, under their names."""
        home = self.parameters
        if home is None:
            return model.to(device)
        for name, parameter in model.layers.named_parameters():
            moved = home.allocate(f"layers.{name}", parameter.numel(), parameter.dtype).view(parameter.shape)
            moved.copy_(parameter.detach())
            parameter.data = moved
            home.behind([parameter.detach()], changed=True)
        for name, module in model.named_children():
            if name != "layers":
                module.to(device)
        return model

    def at_home(self, tensor: Tensor) -> Tensor:
        """What a parameter or a state holds, to be saved."""
        for home in self.all:
            tensor = home.at_home(tensor)
        return tensor

    @contextmanager
    def visiting(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Where tensors are there to be changed, wherever they live."""
        for home in self.all:
            home.fetch(tensors)
        yield
        for home in self.all:
            home.behind(tensors, changed=True)
            home.behind((), changed=False)  # whoever waits for the next to follow need not

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Change a parameter, wherever it lives."""
        with self.visiting([parameter]):
            parameter.copy_(value)


def _home(what: str, config: Resident | ToMemory | ToDisk, device: torch.device, folder: Path) -> Home | None:
    match config:
        case Resident():
            return None
        case ToMemory():
            if device.type == "cpu":
                raise ConfigError(
                    f"offload.{what}.kind = 'cpu' has no effect on device = 'cpu', whose memory that is; set kind = 'disk', or leave it out"
                )
            return Remote(device)
        case ToDisk(folder=chosen):
            disk = Disk(chosen or folder)
            return disk if device.type == "cpu" else Remote(device, disk)


# --- blocks ------------------------------------------------------------------------------------------------------------------------------


def apply(homes: Homes, model: Model) -> None:
    """Make blocks whose parameters live elsewhere call them."""
    if homes.parameters is not None:
        _visits(homes.parameters, model)


def _visits(home: Home, model: Model) -> None:
    """Let every block bring its parameters and those of its neighbour, forwards and backwards, and give them up behind it."""
    blocks = list(model.layers)
    own = [list(block.parameters()) for block in blocks]
    for number, block in enumerate(blocks):
        before, after = (own[n] if 0 <= n < len(own) else [] for n in (number - 1, number + 1))
        block.forward = partial(_through, home, block.forward, own[number], before, after)


def _through(
    home: Home,
    forward: Forward,
    own: Sequence[nn.Parameter],
    before: Sequence[nn.Parameter],
    after: Sequence[nn.Parameter],
    x_TD: Tensor,
    rotation: Rotation | None,
    attend: Attend,
) -> Tensor:
    def come(following: Sequence[nn.Parameter]) -> None:
        home.ahead(own)
        home.ahead(following)
        home.fetch(own)

    def go() -> None:
        home.behind(own, changed=False)

    come(after)
    x_TD = _Border.apply(x_TD, go)  # type: ignore[no-untyped-call]
    out_TD: Tensor = _Border.apply(forward(x_TD, rotation, attend), partial(come, before))  # type: ignore[no-untyped-call]
    go()
    return out_TD


class _Border(torch.autograd.Function):
    """Does nothing, and on the way back something: that is how one knows that a backward pass enters a block, or has left it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, on_the_way_back: Callable[[], None]) -> Tensor:
        ctx.on_the_way_back = on_the_way_back
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        ctx.on_the_way_back()
        return grad_TD, None
