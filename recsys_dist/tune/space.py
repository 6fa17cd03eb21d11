"""What a sweep searches: dotted settings with their ranges, checked before anything starts.

    model.hidden: {choice: [[256, 128], [512, 256]]}
    optimizer.deep.lr: {log: [0.01, 0.3]}
    model.dropout: {uniform: [0, 0.5]}
    model.negatives: {int: [64, 2048]}

Optuna's TPE (Bergstra et al. 2011) proposes; everything it knows is told anew from the ledger each time.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from recsys_dist.config import nearest, rng_for
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.train.settings import TrainConfig

KINDS = ("choice", "log", "uniform", "int")
DIGITS = 4  # of a drawn float: recipes are read by people

Values = dict[str, Any]  # dotted setting -> value

# What is alike in all trials: the sweep sets it itself, or it is what trials are compared by.
_FIXED = ("data", "newest_fraction", "refit", "checkpoints", "metric", "label")


@dataclass(frozen=True)
class Axis:
    """One searched setting; `of` are the choices of a `choice`, else (lowest, highest)."""

    key: str
    kind: str
    of: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """The range as Optuna has it; choices as JSON, for they may be lists."""
        match self.kind:
            case "choice":
                return CategoricalDistribution([json.dumps(value) for value in self.of])
            case "int":
                return IntDistribution(*self.of)
            case _:
                low, high = self.of
                return FloatDistribution(low, high, log=self.kind == "log")

    def encode(self, value: Any) -> Any:
        return json.dumps(value) if self.kind == "choice" else value

    def decode(self, value: Any) -> Any:
        if self.kind == "choice":
            return json.loads(value)
        if self.kind == "int":
            return int(value)
        low, high = self.of
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def holds(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.of
        return isinstance(value, int | float) and self.of[0] <= value <= self.of[1]

    def probes(self) -> tuple[Any, ...]:
        """Values that are valid where the whole axis is: every choice, or the ends."""
        if self.kind == "int":
            low, high = self.of
            return tuple({low, min(low + 1, high), high})  # a multiple of 4 has no valid neighbour
        return self.of


@dataclass(frozen=True)
class Space:
    """All axes of a sweep. `Space.parse` raises ConfigError for what the run's settings do not take."""

    axes: tuple[Axis, ...]

    @classmethod
    def parse(cls, declared: Mapping[str, Any], base: TrainConfig, prepared: Prepared) -> "Space":
        """Axes of `key: {kind: [...]}` lines, each end and each choice tried on `base` and the data."""
        if not declared:
            raise ConfigError(
                "the search space is empty; name settings, as in model.dropout: {uniform: [0, 0.5]}"
            )
        axes = []
        for axis in (_axis(key, value) for key, value in declared.items()):
            found = []
            for value in axis.probes():
                try:
                    cfg = settings(base, {axis.key: value})
                    cfg.check(prepared)
                except ConfigError as error:
                    raise ConfigError(f"search space, {axis.key} = {json.dumps(value)}: {error}") from None
                found.append(_at(cfg.model_dump(mode="json"), axis.key))
            axes.append(replace(axis, of=tuple(found)) if axis.kind == "choice" else axis)
        return cls(tuple(axes))

    def values_of(self, cfg: TrainConfig) -> Values:
        """The settings that `cfg` has on the axes, where they lie in the ranges."""
        dumped = cfg.model_dump(mode="json")
        found = {axis.key: _at(dumped, axis.key) for axis in self.axes}
        return {axis.key: found[axis.key] for axis in self.axes if axis.holds(found[axis.key])}

    def propose(self, told: Iterable["Told"], maximise: bool, first: Values, seed: int) -> Values:
        """What to try next, given all trials so far; the very first is `first`, as far as it goes.

        A function of its arguments: the same trials and seed give the same proposal on every machine.
        """
        trials = list(told)
        # a stream of its own: what is proposed does not depend on how often the sweep was interrupted
        drawn = int(rng_for(seed, "propose", len(trials)).integers(2**31))
        study = self.study(trials, maximise, drawn)
        if not trials:
            study.enqueue_trial({axis.key: axis.encode(first[axis.key]) for axis in self._in(first)})
        params = study.ask({axis.key: axis.distribution() for axis in self.axes}).params
        return {axis.key: axis.decode(params[axis.key]) for axis in self.axes}

    def importance(self, told: Iterable["Told"], maximise: bool) -> dict[str, float]:
        """How much each setting decides, by PED-ANOVA (arXiv 2304.10255); sums to 1, most important first.

        All trials must have been measured at the same budget. Empty where there are too few to tell.
        """
        trials = [trial for trial in told if trial.value is not None]
        if len(trials) < 2 * len(self.axes):
            return {}
        return optuna.importance.get_param_importances(self.study(trials, maximise, 0))

    def study(self, told: Iterable["Told"], maximise: bool, seed: int) -> optuna.Study:
        """An Optuna study that knows the trials."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed)
        study = optuna.create_study(direction="maximize" if maximise else "minimize", sampler=sampler)
        study.add_trials([self._trial(trial) for trial in told])
        return study

    def _in(self, values: Values) -> list[Axis]:
        return [axis for axis in self.axes if axis.key in values]

    def _trial(self, told: "Told") -> FrozenTrial:
        return create_trial(
            state=told.state,
            params={axis.key: axis.encode(told.values[axis.key]) for axis in self.axes},
            distributions={axis.key: axis.distribution() for axis in self.axes},
            value=told.value if told.state == TrialState.COMPLETE else None,
            intermediate_values={told.rung: told.value} if told.value is not None else {},
        )


@dataclass(frozen=True)
class Told:
    """A trial as Optuna hears of it: its newest value, at which rung, and whether that was the last rung.

    value  None while it runs its first rung, and where it failed
    """

    values: Values
    rung: int
    value: float | None
    last: bool
    failed: bool = False

    @property
    def state(self) -> TrialState:
        """Below the last rung it is "pruned": TPE ranks by how far a trial came, and its value there."""
        if self.failed:
            return TrialState.FAIL
        if self.value is None:
            return TrialState.RUNNING
        return TrialState.COMPLETE if self.last else TrialState.PRUNED


def settings(base: TrainConfig, values: Values) -> TrainConfig:
    """`base` with dotted settings replaced; ConfigError names the nearest for one that does not exist."""
    return base.override([f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()])


def _axis(key: str, declared: Any) -> Axis:
    if key in _FIXED:
        raise ConfigError(
            f"search space, {key}: it is alike in all trials, as {', '.join(_FIXED)} are; take it out"
        )
    if not isinstance(declared, Mapping) or len(declared) != 1:
        raise ConfigError(
            f"search space, {key}: expected one of {{choice: [..]}}, {{log: [low, high]}}, "
            f"{{uniform: [low, high]}}, {{int: [low, high]}}; given: {declared!r:.80}"
        )
    [(kind, of)] = declared.items()
    if kind not in KINDS:
        raise ConfigError(f"search space, {key}: no such range {kind!r}{nearest(str(kind), list(KINDS))}")
    if not isinstance(of, list | tuple) or not of:
        raise ConfigError(f"search space, {key}: {kind} takes a list, given: {of!r:.80}")
    if kind == "choice" and not all(isinstance(one, str | int | float | list | dict | None) for one in of):
        raise ConfigError(
            f"search space, {key}: a choice is text, a number or a list of them; given: {of!r:.80}"
        )
    if kind != "choice":
        of = [_number(end) for end in of]
        _check_ends(key, kind, of)
    return Axis(key, kind, tuple(of))


def _number(end: Any) -> Any:
    """YAML reads `1e-4` as text: it wants a point in a float."""
    try:
        return float(end) if isinstance(end, str) else end
    except ValueError:
        return end


def _check_ends(key: str, kind: str, of: list[Any]) -> None:
    of_type = int if kind == "int" else int | float
    if len(of) != 2 or not all(isinstance(end, of_type) and not isinstance(end, bool) for end in of):
        raise ConfigError(
            f"search space, {key}: {kind} takes [lowest, highest] as {'whole ' * (kind == 'int')}numbers, "
            f"given: {of!r:.80}"
        )
    if not all(map(math.isfinite, of)) or not of[0] < of[1] or (kind == "log" and of[0] <= 0):
        limit = f"{'0 < ' * (kind == 'log')}lowest < highest < .inf"
        raise ConfigError(f"search space, {key}: {kind} needs {limit}, given: {of!r:.80}")


def _at(values: Any, key: str) -> Any:
    """None where there is nothing, as of a key that only a trial gives a mapping."""
    for part in key.split("."):
        values = values.get(part)
        if values is None:
            return None
    return values
