"""The same search as a sweep file of Weights & Biases, for those whose agents run there."""

from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from fine_tune.sweeps.space import Sweep, values_of

METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}


def write_wandb(sweep: Sweep, name: str, flags: list[str], file: Path) -> None:
    """Write a sweep file for ``wandb sweep``; of several metrics it knows the first one.

    Args:
        sweep: What is searched.
        name: The sweep's.
        flags: Of ``fit``.
        file: Where to.
    """
    metric, direction = next(iter(sweep.metrics.items()))
    told = {
        "name": name,
        "method": METHODS[sweep.sampler],
        "metric": {"name": metric, "goal": direction},
        "parameters": {key: _parameter(p) for key, p in sweep.parameters.items()},
        "command": ["${env}", "${interpreter}", "-m", "fine_tune", "fit", *flags, "${args}"],
    }
    file.write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), "utf-8")


def _parameter(parameter: BaseDistribution) -> dict[str, Any]:
    if isinstance(parameter, CategoricalDistribution):
        return {"values": list(parameter.choices)}
    if isinstance(parameter, IntDistribution):
        if parameter.log or parameter.step > 1:
            kind = "q_log_uniform_values" if parameter.log else "values"
            if kind == "values":
                return {"values": values_of(parameter)}
            return {"distribution": kind, "min": parameter.low, "max": parameter.high, "q": 1}
        return {"distribution": "int_uniform", "min": parameter.low, "max": parameter.high}
    assert isinstance(parameter, FloatDistribution)
    kind = "log_uniform_values" if parameter.log else "uniform"
    return {"distribution": kind, "min": parameter.low, "max": parameter.high}
