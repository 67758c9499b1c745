"""A sweep's YAML: which settings are searched and where, by what they are judged, and how."""

import math
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from fine_tune.errors import UserError, nearest
from fine_tune.settings import Loader, read_yaml

DIRECTIONS = ("minimize", "maximize")
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "hyperband", "none")
KEYS = ["metrics", "parameters", "sampler", "pruner", "seeds"]
DISTRIBUTIONS = {
    "log_uniform": ("low", "high"),
    "uniform": ("low", "high"),
    "int": ("low", "high", "step", "log"),
}
COSTS = ("seconds", "memory_gib")  # of a run, beside what it logs
Setting = dict[str, Any]  # values by the settings' keys
OF_THE_SWEEP = {
    "seed_everything": "give seeds: [1, 2, 3]",
    "name": "trials have names of their own",
    "ckpt_path": "every trial starts anew",
    "report": "it changes no run",
    "test_at_end": "the test split stays sealed; see --test_winner",
    "targets": "they change no run",
    "data.cache_dir": "it changes no run",
    "trainer.default_root_dir": "trials lie in the sweep's folder",
}
WORDS_OF_A_VALUE = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Args:
        parameters: What is searched, by the settings' keys.
        metrics: What settings are judged by -> ``minimize`` or ``maximize``; several: none is given up for another.
        sampler: tpe, random or grid.
        pruner: median, hyperband or none: whether hopeless trials end early.
        seeds: ``seed_everything`` of each run of a setting; empty: the config's own.
    """

    parameters: dict[str, BaseDistribution]
    metrics: dict[str, str]
    sampler: str = "tpe"
    pruner: str = "median"
    seeds: tuple[int, ...] = field(default_factory=tuple)

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each parameter, of a grid."""
        return {key: values_of(parameter) for key, parameter in self.parameters.items()}

    @property
    def num_settings(self) -> int | None:
        """How many different settings there are; None: no end of them."""
        if any(isinstance(p, FloatDistribution) for p in self.parameters.values()):
            return None
        return math.prod(len(values) for values in self.grid.values())

    def corners(self) -> list[dict[str, Any]]:
        """Return settings that together hold every least, greatest and listed value: what a parser should see."""
        ends = [
            p.choices if isinstance(p, CategoricalDistribution) else (p.low, p.high)  # type: ignore[attr-defined]
            for p in self.parameters.values()
        ]
        longest = max(len(values) for values in ends)
        return [
            {
                key: values[min(i, len(values) - 1)]
                for key, values in zip(self.parameters, ends, strict=True)
            }
            for i in range(longest)
        ]

    def all_settings(self) -> list[dict[str, Any]]:
        """Return every setting of a grid."""
        return [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


def values_of(parameter: BaseDistribution) -> list[Any]:
    """Return the values a parameter can take, where they can be counted."""
    if isinstance(parameter, CategoricalDistribution):
        return list(parameter.choices)
    assert isinstance(parameter, IntDistribution)
    return list(range(parameter.low, parameter.high + 1, parameter.step))


def told_of(parameter: BaseDistribution) -> str:
    """Say in one line what a parameter can be."""
    if isinstance(parameter, CategoricalDistribution):
        return ", ".join(str(choice) for choice in parameter.choices)
    assert isinstance(parameter, FloatDistribution | IntDistribution)
    kind = "int" if isinstance(parameter, IntDistribution) else "uniform"
    scale = "log " if parameter.log else ""
    return f"{scale}{kind} {parameter.low:g} – {parameter.high:g}"


def read_sweep(file: str) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: One line per problem, each with the key, what is allowed, and how to write it.
    """
    _, problems = read_yaml(file)
    if problems:
        raise UserError(*(problem.replace("--config:", "--sweep:") for problem in problems))
    told: Any = yaml.load(Path(file).read_text("utf-8"), Loader=Loader)
    if not isinstance(told, dict):
        raise UserError(f"{file}: give a mapping with {', '.join(KEYS)}")
    problems = [
        f"{file}: unknown key '{key}'{nearest(str(key), KEYS) or '; known: ' + ', '.join(KEYS)}"
        for key in told
        if key not in KEYS
    ]
    parameters = _parameters(file, told.get("parameters"), problems)
    metrics = _metrics(file, told.get("metrics", {"val/loss": "minimize"}), problems)
    sampler = _word(file, "sampler", told.get("sampler", "tpe"), SAMPLERS, problems)
    pruner = _word(file, "pruner", told.get("pruner", "median") or "none", PRUNERS, problems)
    seeds = told.get("seeds", [])
    if not isinstance(seeds, list) or not all(type(s) is int and 0 <= s < 2**32 for s in seeds):
        problems.append(
            f"{file}: seeds: give a list of whole numbers, like [1, 2, 3]; got {seeds!r}"
        )
    elif len(set(seeds)) < len(seeds):
        problems.append(f"{file}: seeds: {seeds} names one twice")
    endless = [key for key, p in parameters.items() if isinstance(p, FloatDistribution)]
    if sampler == "grid" and endless:
        problems.append(
            f"{file}: sampler: a grid needs lists of values or int; {', '.join(endless)} has no end of them"
        )
    if len(metrics) > 1 and pruner != "none":
        if "pruner" in told:
            problems.append(
                f"{file}: pruner: trials judged by several metrics are not ended early; leave it out"
            )
        pruner = "none"
    if problems:
        raise UserError(*problems)
    return Sweep(parameters, metrics, sampler, pruner, tuple(seeds))


def _word(file: str, key: str, given: Any, allowed: tuple[str, ...], problems: list[str]) -> str:
    if given not in allowed:
        problems.append(f"{file}: {key}: '{given}' is not known; use {', '.join(allowed)}")
    return str(given)


def _metrics(file: str, told: Any, problems: list[str]) -> dict[str, str]:
    if not isinstance(told, dict) or not told:
        problems.append(f"{file}: metrics: give names and directions, like {{val/loss: minimize}}")
        return {}
    for name, direction in told.items():
        if direction not in DIRECTIONS:
            problems.append(
                f"{file}: metrics.{name}: '{direction}' is no direction; use {' or '.join(DIRECTIONS)}"
            )
    return {str(name): str(direction) for name, direction in told.items()}


def _parameters(file: str, told: Any, problems: list[str]) -> dict[str, BaseDistribution]:
    if not isinstance(told, dict) or not told:
        problems.append(
            f"{file}: parameters: nothing is searched; name at least one setting, like "
            "model.optimizer.lr: {distribution: log_uniform, low: 1e-5, high: 1e-3}"
        )
        return {}
    found = {}
    for key, given in told.items():
        where, key = f"{file}: parameters.{key}", str(key).replace(".init_args.", ".")
        if key in OF_THE_SWEEP:
            problems.append(f"{where}: not searched: {OF_THE_SWEEP[key]}")
            continue
        if key in found:
            problems.append(f"{where}: named twice, once with init_args and once without")
        try:
            found[key] = _parameter(given)
        except (ValueError, OverflowError) as error:
            problems.append(f"{where}: {error}")
    return found


def _parameter(given: Any) -> BaseDistribution:
    if isinstance(given, list):
        return _listed(given)
    if not isinstance(given, dict) or given.get("distribution") not in [*DISTRIBUTIONS]:
        raise ValueError(
            f"give a list of values, or a distribution: {', '.join(DISTRIBUTIONS)} with low and high; got {given!r}"
        )
    kind = given["distribution"]
    unknown = given.keys() - {"distribution", *DISTRIBUTIONS[kind]}
    if unknown:
        raise ValueError(
            f"{kind} has no '{unknown.pop()}'; it takes {', '.join(DISTRIBUTIONS[kind])}"
        )
    low, high = (_number(given, name, whole=kind == "int") for name in ("low", "high"))
    if low > high:
        raise ValueError(f"low {low} is above high {high}")
    log = kind == "log_uniform" or given.get("log", False)
    if log not in (True, False):
        raise ValueError(f"log: must be true or false, got {log!r}")
    if log and low <= 0:
        raise ValueError(f"low must be above 0 on a logarithmic scale, got {low}")
    if kind != "int":
        return FloatDistribution(low, high, log=log)
    step = given.get("step", 1)
    if type(step) is not int or step < 1 or (log and step != 1):
        raise ValueError(f"step: must be 1 or more, and 1 on a logarithmic scale; got {step!r}")
    return IntDistribution(int(low), int(low + (high - low) // step * step), log=log, step=step)


def _listed(given: list[Any]) -> CategoricalDistribution:
    if not given:
        raise ValueError("the list of values is empty")
    wrong = [value for value in given if not isinstance(value, WORDS_OF_A_VALUE)]
    if wrong:
        raise ValueError(f"a value must be a word, a number, true, false or null; got {wrong[0]!r}")
    alike = [(a, b) for i, a in enumerate(given) for b in given[:i] if a == b or str(a) == str(b)]
    if alike:
        raise ValueError(f"{alike[0][1]!r} and {alike[0][0]!r} are the same value")
    return CategoricalDistribution(given)


def _number(given: dict[str, Any], name: str, *, whole: bool) -> float:
    value = given.get(name)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not math.isfinite(value):  # type: ignore[arg-type]
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: {wanted} is needed, got {value!r}")
    return value  # type: ignore[return-value]
