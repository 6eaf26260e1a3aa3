"""The optimizer: a method for each parameter, and stores for its weights and its state.

A step walks over the parameters. Methods that treat elements alone get stretches of 2^18 of them, so that unpacked weights, gradients and
state stay in the cache and the memory that a step needs does not depend on the model. Everything is a pure function of what was there
before, the gradients, the rate and the step: a resumed run repeats the bits of one that was not interrupted.

    optimizer = build(config, model.named_parameters())
    optimizer.step(rate(config, step, num_steps))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from gemel.config.errors import CheckpointError, ConfigError
from gemel.config.optim import SGD, Adafactor, AdamW, Lion, Muon, OptimConfig
from gemel.model.stored import Stored
from gemel.ops.adamw import Draws, Part
from gemel.train.offload import Home, Homes
from gemel.train.optim import adafactor, adamw, lion, muon, noise, sgd
from gemel.train.optim.method import At, Method, Slot
from gemel.train.optim.settings import Settings, assign, shapes_of
from gemel.train.optim.storage import Allocate, Blocks, Halved, Plain, Rounded, Store

STRETCH = noise.TABLE
LEAST_FOR_INT8 = 4096  # smaller tensors stay in fp32: norms and biases are sensitive, and what they cost is nothing (Dettmers et al. 2022)


class Member:
    """One parameter with its method, its settings and its stores; or its elements from `start` on, which move by the same bits.

    Where it lives `elsewhere`, it moves in pieces, so that little of it has to be here at any time.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        method: Method,
        settings: Settings,
        config: OptimConfig,
        allocate: Allocate,
        start: int = 0,
        elsewhere: bool = False,
    ):
        self.name, self.parameter, self.method, self.settings, self._seed = name, parameter, method, settings, config.seed
        self._start, self._elsewhere = start, elsewhere
        self.num_steps = 0
        self._slots = method.slots(parameter.shape)
        self._weight = _weight_store(config, name, parameter, allocate)
        self._state = [_state_store(config, f"{name}.{slot.name}", slot, allocate) for slot in self._slots]

    def begin(self, lr: float) -> At:
        """A step; `proceed` must follow for all of `starts`."""
        self.num_steps += 1
        return At(lr * self.settings.lr_scale, self.settings.weight_decay, self.num_steps)

    def proceed(self, at: At, start: int) -> None:
        """Move the piece of the weights that begins at `start` along its gradient."""
        assert self.parameter.grad is not None
        flat, stop = self.parameter.grad.detach().reshape(-1), min(start + self.piece, self.parameter.numel())
        if self._update_stored(at, flat, start, stop):
            return
        for begin, end in self._stretches(start, stop):
            self._update(at, flat[begin:end].float(), begin)

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """They end where those of the whole parameter do."""
        while start < stop:
            end = min(start + STRETCH - self._place(start)[1], stop) if self.method.elementwise else stop
            yield start, end
            start = end

    def _place(self, start: int) -> tuple[int, int]:
        """The stretch of the whole parameter that an element lies in, and where in it."""
        offset = (self._start + start) % STRETCH if self.method.elementwise else 0
        return self._start + start - offset, offset

    @property
    def piece(self) -> int:
        """Elements that move together: all, or several stretches if they are fetched first, because disks like long reads."""
        return 8 * STRETCH if self._elsewhere and self.method.elementwise else max(self.parameter.numel(), 1)

    @property
    def starts(self) -> range:
        """Of the pieces."""
        return range(0, self.parameter.numel(), self.piece)

    def part(self, start: int) -> tuple[float, float]:
        """What share of the whole the piece that begins at `start` is."""
        num = self.parameter.numel()
        return start / num, min(start + self.piece, num) / num

    @property
    def memory(self) -> list[Tensor]:
        """Everything that a step reads and writes: weights and state."""
        return [self.parameter.detach(), *(x for store in (self._weight, *self._state) for x in store.kept.values())]

    def _update(self, at: At, g: Tensor, start: int) -> None:
        stop = start + g.numel()
        w = self._weight.read(start, stop)
        state = [
            store.read(start, stop) if self.method.elementwise else store.read(0, slot.shape.numel()).view(slot.shape)
            for store, slot in zip(self._state, self._slots, strict=True)
        ]
        shape = g.shape if self.method.elementwise else self.parameter.shape
        self.method.update(w.view(shape), g.view(shape), state, at)
        if self.settings.l1:
            w.copy_(torch.nn.functional.softshrink(w, at.lr * self.settings.l1))
        for number, (store, x) in enumerate(zip((self._weight, *self._state), (w, *state), strict=True)):
            store.write(start, x.view(-1), self._key(at, number, start), self._place(start)[1])

    def _update_stored(self, at: At, g: Tensor, start: int, stop: int) -> bool:
        """All of a piece in one pass, if method and stores have one."""
        stores = [store for store in (self._weight, *self._state) if isinstance(store, Plain | Halved | Rounded)]
        if not isinstance(self.method, adamw.AdamW) or len(stores) < 1 + len(self._state):
            return False
        weight, first, second = (store.stored(start, stop, partial(self._draws, at, n, start, stop)) for n, store in enumerate(stores))
        return self.method.update_stored(Part(weight, g[start:stop], first, second), at, self.settings.l1)

    def _draws(self, at: At, number: int, start: int, stop: int) -> Draws:
        keys = tuple(self._key(at, number, begin) for begin, _ in self._stretches(start, stop))
        return Draws(keys, self._place(start)[1], STRETCH)

    def _key(self, at: At, number: int, start: int) -> int:
        """Decides how what is stored is rounded: number 0 is the weight, then come the slots."""
        return noise.key(self._seed, self.name, at.step, number, self._place(start)[0])

    def kept(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint needs, in the shapes of what they belong to where they have as many elements."""
        found = {f"{self.name}.{suffix}": x.view(self.parameter.shape) for suffix, x in self._weight.kept.items()}
        for store, slot in zip(self._state, self._slots, strict=True):
            for suffix, x in store.kept.items():
                name = ".".join(filter(None, (self.name, slot.name, suffix)))
                found[name] = x.view(slot.shape) if x.numel() == slot.shape.numel() else x
        return found


class Optimizer:
    """All parameters that are trained. Make it with `build`."""

    def __init__(self, members: Sequence[Member], homes: Sequence[Home] = ()):
        self._members, self._homes = members, homes

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the `.grad` of every parameter, which are not changed. `lr` is the rate of this step."""
        pieces = [(member, start) for member in self._members if member.parameter.grad is not None for start in member.starts]
        for (member, start), following in zip_longest(pieces, pieces[1:]):
            if start == 0:
                at = member.begin(lr)
            for home in self._homes:
                home.ahead(member.memory, member.part(start))
                if following is not None:
                    home.ahead(following[0].memory, following[0].part(following[1]))
                home.fetch(member.memory)
            member.proceed(at, start)
            for home in self._homes:
                home.behind(member.memory, changed=True, part=member.part(start))

    @property
    def state_bytes(self) -> int:
        """Bytes of everything that is kept beside the parameters themselves."""
        return sum(x.nbytes for member in self._members for x in member.kept().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors by name, fit for safetensors; they share memory with the optimizer. The parameters are not among them."""
        tensors = {name: self._at_home(x) for member in self._members for name, x in member.kept().items()}
        return tensors | {f"{member.name}.step": torch.tensor(member.num_steps) for member in self._members}

    @property
    def parameters(self) -> dict[str, str]:
        """The parameter that each name in `state_dict` belongs to."""
        return {key: member.name for member in self._members for key in (*member.kept(), f"{member.name}.step")}

    def load_state_dict(self, state: Mapping[str, Tensor | Stored]) -> None:
        """Take over what `state_dict` gave. `CheckpointError`, and nothing changed, if it is of another model or configuration.

        What is stored is read once, a tensor at a time.
        """
        mine = self.state_dict()
        _check(mine, state)
        for name, x in mine.items():
            saved = state[name]
            x.copy_(saved if isinstance(saved, Tensor) else saved.tensor())
            for home in self._homes:
                home.behind([x], changed=False)
        for member in self._members:
            member.num_steps = int(mine[f"{member.name}.step"])

    def _at_home(self, x: Tensor) -> Tensor:
        for home in self._homes:
            x = home.at_home(x)
        return x


def build(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    sections: Mapping[str, Sequence[int]] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    starts: Mapping[str, int] | None = None,
    homes: Homes | None = None,
) -> Optimizer:
    """The optimizer of all parameters that require gradients.

    `sections` are, by parameter name, the heights of matrices that lie fused in one; only Muon asks for them. Where this
    process moves only a part, `whole` are all trained parameters (without memory, perhaps), which decide what patterns hit, and `starts`
    says where what is given begins. `homes` are where state and parameters live, if not where they are used. `ConfigError` if nothing is
    trained, if a parameter's type does not fit `weights`, or if a pattern hits nothing.
    """
    trained = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    if not (whole or trained):
        raise ConfigError("no parameter requires gradients, so there is nothing to train; freeze fewer of them")
    settings = assign(config, whole or trained)
    device = next((parameter.device for parameter in trained.values()), torch.device("cpu"))
    methods = _methods(config, whole or trained, sections or {}, device)
    members = []
    for name, parameter in trained.items():
        _check_type(config, name, parameter)
        one = settings[name]
        if isinstance(config.method, Muon) and not isinstance(methods[name], muon.Muon):
            one = Settings(one.lr_scale * config.method.rest_lr_scale, one.weight_decay, one.l1)
        allocate = _in_memory(parameter.device) if homes is None or homes.optimizer is None else homes.optimizer.allocate
        start, elsewhere = (starts or {}).get(name, 0), homes is not None and bool(homes.all)
        members.append(Member(name, parameter, methods[name], one, config, allocate, start, elsewhere))
        for home in homes.all if homes else ():
            home.behind(members[-1].memory, changed=True)
    return Optimizer(members, homes.all if homes else ())


def indivisible(config: OptimConfig, trained: Mapping[str, Tensor], anywhere: bool = False) -> frozenset[str]:
    """Names of parameters that must not be cut between stretches; with `anywhere`, not elsewhere either.

    A method may look at a matrix as a whole, and state of 8 bits has blocks that begin where stretches do.
    """
    methods = _methods(config, trained, {}, torch.device("cpu"))
    return frozenset(
        name
        for name, x in trained.items()
        if not methods[name].elementwise or (anywhere and any(_in_blocks(config, slot) for slot in methods[name].slots(x.shape)))
    )


def _methods(
    config: OptimConfig, trained: Mapping[str, Tensor], sections: Mapping[str, Sequence[int]], device: torch.device
) -> dict[str, Method]:
    method = config.method
    if not isinstance(method, Muon):
        return dict.fromkeys(trained, _method(method))
    for pattern in method.matrices:
        if not any(fnmatchcase(name, pattern) and x.dim() == 2 for name, x in trained.items()):
            raise ConfigError(f"method.matrices has {pattern!r}, which no trained matrix is named like; there are: {shapes_of(trained)}")
    rest = _method(method.rest)
    is_matrix = {name: x.dim() == 2 and any(fnmatchcase(name, p) for p in method.matrices) for name, x in trained.items()}
    return {name: muon.Muon(method, device, sections.get(name, ())) if is_matrix[name] else rest for name in trained}


def _method(config: AdamW | Adafactor | Lion | SGD) -> Method:
    if isinstance(config, AdamW):
        return adamw.AdamW(config)
    if isinstance(config, Adafactor):
        return adafactor.Adafactor(config)
    return lion.Lion(config) if isinstance(config, Lion) else sgd.SGD(config)


def _check_type(config: OptimConfig, name: str, parameter: Tensor) -> None:
    wanted = torch.float32 if config.weights == "fp32" else torch.bfloat16
    if parameter.dtype != wanted:
        fits = {torch.float32: "'fp32'", torch.bfloat16: "'master' or 'stochastic'"}.get(parameter.dtype)
        way_out = f"set weights = {fits}" if fits else f"convert the model to {wanted}"
        raise ConfigError(f"{name} is {parameter.dtype}, and weights = {config.weights!r} needs {wanted}; {way_out}")
    assert parameter.is_contiguous(), f"{name} is not contiguous"


def _weight_store(config: OptimConfig, name: str, parameter: Tensor, allocate: Allocate) -> Store:
    data = parameter.detach().view(-1)
    if config.weights == "fp32":
        return Plain(data, kept=False)
    if config.weights == "master":
        return Halved(data, allocate(f"{name}.low", data.numel(), torch.int16))
    return Rounded(data, kept=False)


def _state_store(config: OptimConfig, name: str, slot: Slot, allocate: Allocate) -> Store:
    num = slot.shape.numel()
    if config.state == "bf16" and not slot.small:
        return Rounded(allocate(name, num, torch.bfloat16))
    if _in_blocks(config, slot):
        return Blocks.allocate(allocate, name, num, slot.signed)
    return Plain(allocate(name, num, torch.float32))


def _in_blocks(config: OptimConfig, slot: Slot) -> bool:
    return config.state == "int8" and not slot.small and slot.shape.numel() >= LEAST_FOR_INT8


def _in_memory(device: torch.device) -> Allocate:
    return lambda _, num, dtype: torch.zeros(num, dtype=dtype, device=device)


def _check(mine: Mapping[str, Tensor], state: Mapping[str, Tensor | Stored]) -> None:
    missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    if missing or extra:
        lacks = f"lacks {missing[0]} and {len(missing) - 1} more" if missing else ""
        has = f"has {extra[0]} and {len(extra) - 1} more, which nobody asks for" if extra else ""
        raise CheckpointError(
            f"the saved optimizer state {' and '.join(filter(None, (lacks, has)))}: it is of another model, or of another "
            "method, state or weights in [train.optim]; set them as they were, or begin without this state"
        )
    for name, x in mine.items():
        if (x.shape, x.dtype) != (state[name].shape, state[name].dtype):
            raise CheckpointError(
                f"the saved optimizer state has {name} as {list(state[name].shape)} of {state[name].dtype}, "
                f"not {list(x.shape)} of {x.dtype}; it is of another model"
            )
