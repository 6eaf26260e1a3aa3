"""A search over fields of a recipe: trials, one after the other, each a run of its own.

    out/search.json        what is searched, and what came of every trial so far
    out/trials/0007/       the run of trial 7, as `gemel train` leaves it
    out/prepared/          learnt tokenizers and tokenized data, which trials share

What trial n tries is a function of the search, its seed, n, and what came of trials before n. So a search that was killed does not have to
remember what it was about to do: it asks again, gets the same answer, and finds that trial's run as far as it had come.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gemel.config.data.pipeline import place
from gemel.config.errors import ConfigError, GemelError, UnsupportedError
from gemel.config.search import Bayes, Choice, Float, Grid, HalvingPrune, Integer, MedianPrune, NoPrune, Prune, Random, SearchConfig
from gemel.config.train import TrainRecipe
from gemel.data import manifest
from gemel.train import metrics, run

FILE = "search.json"
State = Literal["finished", "pruned", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    """What was tried and what came of it.

    loss    of validation at the end, or where it was given up; None if it failed
    looks   steps and validation losses
    reason  why it failed
    """

    number: int
    values: dict[str, Any]
    state: State
    loss: float | None
    looks: list[tuple[int, float]]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """All trials there are. `finished` is false if somebody stopped the search."""

    trials: list[Trial]
    finished: bool

    @property
    def best(self) -> Trial | None:
        """The one with the least loss of those that came to their end."""
        ended = [trial for trial in self.trials if trial.state == "finished" and trial.loss is not None]
        return min(ended, key=lambda trial: trial.loss or 0.0, default=None)


def search(config: SearchConfig, recipe: TrainRecipe, peak_flops_per_s: float | None = None, quiet: bool = False) -> Outcome:
    """Do what is missing of a search. The recipe says everything that the search does not, and `out`."""
    _check(config, recipe)
    recipe.out.mkdir(parents=True, exist_ok=True)
    with manifest.Lock(recipe.out, shared=False):
        trials = _stored(config, recipe)
        for number in range(len(trials), _num_trials(config)):
            values = suggest(config, number, trials)
            trial = _try(config, recipe, number, values, trials, peak_flops_per_s, quiet)
            if trial is None:
                return Outcome(trials, False)
            trials.append(trial)
            _store(config, recipe, trials)
            if config.keep == "best":
                _keep(recipe.out, Outcome(trials, True).best)
    return Outcome(trials, True)


def _try(
    config: SearchConfig,
    recipe: TrainRecipe,
    number: int,
    values: dict[str, Any],
    others: Sequence[Trial],
    peak_flops_per_s: float | None,
    quiet: bool,
) -> Trial | None:
    """One trial; None if somebody stopped it."""
    folder = recipe.out / "trials" / f"{number:04d}"

    def give_up(step: int, loss: float) -> bool:
        return step < recipe.steps and hopeless(config.prune, step, loss, others)

    if not any(give_up(*look) for look in _looks(folder)):  # else it was given up, and then the search was killed
        try:
            changed = with_values(recipe, values).model_copy(update={"out": folder})
            result = run.run(changed, peak_flops_per_s, quiet, give_up, recipe.out / "prepared")
        except GemelError as error:  # of these values, not of the search: a rate at which everything bursts, a width that does not divide
            return Trial(number, values, "failed", None, _looks(folder), str(error))
        if not result.finished:
            return None
    looks = _looks(folder)
    if not looks or not math.isfinite(looks[-1][1]):
        return Trial(number, values, "failed", None, looks, "the validation loss is not finite")
    return Trial(number, values, "pruned" if give_up(*looks[-1]) else "finished", looks[-1][1], looks)


def with_values(recipe: TrainRecipe, values: Mapping[str, Any]) -> TrainRecipe:
    """A recipe with other values at some of its keys. `ConfigError` if there is no such key or value."""
    plain = recipe.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        place(plain, key, value, f"{key} = {value!r}")
    return TrainRecipe.parse(plain)


# --- what is tried next -------------------------------------------------------------------------------------------------------------------


def suggest(config: SearchConfig, number: int, before: Sequence[Trial]) -> dict[str, Any]:
    """The values of trial `number`, from 0."""
    match config.method:
        case Grid():
            lists = [parameter.grid(name) for name, parameter in config.space.items()]
            return dict(zip(config.space, next(itertools.islice(itertools.product(*lists), number, None)), strict=True))
        case Random():
            return _drawn(config, number)
        case Bayes(startup=startup):
            return _drawn(config, number) if number < startup else _modelled(config, number, before)


def _num_trials(config: SearchConfig) -> int:
    if isinstance(config.method, Grid):
        return math.prod(len(parameter.grid(name)) for name, parameter in config.space.items())
    return config.method.trials


def _drawn(config: SearchConfig, number: int) -> dict[str, Any]:
    return {name: parameter.at(random.Random(f"{config.seed} {number} {name}").random()) for name, parameter in config.space.items()}


def _modelled(config: SearchConfig, number: int, before: Sequence[Trial]) -> dict[str, Any]:
    """By Optuna, whose study is built anew from the trials so far."""
    optuna = _optuna()
    kinds = {name: _distribution(optuna, parameter) for name, parameter in config.space.items()}
    sampler = optuna.samplers.TPESampler(seed=random.Random(f"{config.seed} {number}").getrandbits(32), n_startup_trials=0)
    study = optuna.create_study(sampler=sampler)
    states = optuna.trial.TrialState
    for trial in before:
        study.add_trial(
            optuna.trial.create_trial(
                state={"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[trial.state],
                params={name: _stored_as(parameter, trial.values[name]) for name, parameter in config.space.items()},
                distributions=kinds,
                value=trial.loss if trial.state == "finished" else None,
                intermediate_values={step: loss for step, loss in trial.looks if math.isfinite(loss)},
            )
        )
    found = study.ask(kinds).params
    return {
        name: parameter.values[found[name]] if isinstance(parameter, Choice) else found[name] for name, parameter in config.space.items()
    }


def _stored_as(parameter: Choice | Float | Integer, value: Any) -> Any:
    """Choices are numbered, for they may be tables."""
    return parameter.values.index(value) if isinstance(parameter, Choice) else value


def _distribution(optuna: Any, parameter: Choice | Float | Integer) -> Any:
    match parameter:
        case Choice(values=values):
            return optuna.distributions.CategoricalDistribution(list(range(len(values))))
        case Float():
            return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case Integer():
            high = parameter.low + (parameter.high - parameter.low) // parameter.step * parameter.step
            return optuna.distributions.IntDistribution(parameter.low, high, log=parameter.log, step=parameter.step)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UnsupportedError("method.kind = 'bayes' needs a package: pip install 'gemel[search]'; or take kind = 'random'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# --- what is given up ---------------------------------------------------------------------------------------------------------------------


def hopeless(config: Prune, step: int, loss: float, others: Sequence[Trial]) -> bool:
    """Whether a trial with this validation loss at this step is to be given up, after what others had there."""
    there = [dict(other.looks)[step] for other in others if step in dict(other.looks)]
    match config:
        case NoPrune():
            return False
        case MedianPrune(trials=trials, steps=steps):
            return step >= steps and len(there) >= trials and loss > sorted(there)[(len(there) - 1) // 2]
        case HalvingPrune(steps=steps, factor=factor):
            if step not in _rungs(steps, factor, step):
                return False
            return sum(other < loss for other in there) >= max((len(there) + 1) // factor, 1)


def _rungs(steps: int, factor: int, last: int) -> Iterator[int]:
    while steps <= last:
        yield steps
        steps *= factor


# --- what is there ------------------------------------------------------------------------------------------------------------------------


def _check(config: SearchConfig, recipe: TrainRecipe) -> None:
    """What would otherwise come to light after hours."""
    if not (recipe.data.validation or recipe.data.holdout):
        raise ConfigError("a search compares validation losses: set data.holdout = 0.01, or give data.validation")
    if not isinstance(config.prune, NoPrune) and not recipe.validation.every:
        raise ConfigError("prune looks at validation losses on the way: set validation.every")
    if isinstance(config.prune, HalvingPrune) and config.prune.steps % recipe.validation.every:
        raise ConfigError(
            f"prune.steps = {config.prune.steps} is no multiple of validation.every = {recipe.validation.every}, so nobody looks there"
        )
    if isinstance(config.method, Bayes):
        _optuna()
    for name, parameter in config.space.items():
        errors = [error for share in (0.0, 0.999) if (error := _mistake(recipe, name, parameter.at(share)))]
        if len(errors) == 2:  # one of them may be of values that fit only together with others, which its trial will show
            raise errors[0]


def _mistake(recipe: TrainRecipe, name: str, value: Any) -> ConfigError | None:
    try:
        with_values(recipe, {name: value})
    except ConfigError as error:
        return error
    return None


def _looks(folder: Path) -> list[tuple[int, float]]:
    if not (folder / metrics.FILE).exists():
        return []
    lines = [line for line in metrics.read(folder) if line.get("event") == "validation"]
    return [(line["step"], line["loss"]) for line in lines]


def _what(config: SearchConfig, recipe: TrainRecipe) -> dict[str, Any]:
    return {"search": config.model_dump(mode="json"), "recipe": recipe.what() | {"steps": recipe.steps}}


def _stored(config: SearchConfig, recipe: TrainRecipe) -> list[Trial]:
    path = recipe.out / FILE
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(_what(config, recipe)))
    for one in (found["what"], now):
        one["search"]["method"].pop("trials", None)  # more of them make a search longer
    if differences := list(manifest.differences("", found["what"], now)):
        raise ConfigError(
            f"{recipe.out} holds another search: {'; '.join(differences[:5])}. Give another --output, or remove that folder to begin anew"
        )
    return [Trial(**trial | {"looks": [(step, loss) for step, loss in trial["looks"]]}) for trial in found["trials"]]


def _store(config: SearchConfig, recipe: TrainRecipe, trials: Sequence[Trial]) -> None:
    draft = recipe.out / "work" / FILE
    draft.write_text(json.dumps({"what": _what(config, recipe), "trials": [asdict(trial) for trial in trials]}, indent=1), encoding="utf-8")
    draft.replace(recipe.out / FILE)


def _keep(out: Path, best: Trial | None) -> None:
    """The best trial's checkpoints, and of all others what they measured."""
    for folder in (out / "trials").glob("*"):
        if best is None or folder.name != f"{best.number:04d}":
            for name in ("latest", "best"):
                (folder / name).unlink(missing_ok=True)
            for path in [folder / "state", *folder.glob("step-*")]:
                shutil.rmtree(path, ignore_errors=True)
