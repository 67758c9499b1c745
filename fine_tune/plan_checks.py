"""What a verb will measure, held against what the settings ask of it, before weights load."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jsonargparse import Namespace

from fine_tune.batches import DataPlan
from fine_tune.errors import nearest
from fine_tune.runs.answers import OF_ANSWERS
from fine_tune.strategies import strategy_problems


def plan_problems(settings: Namespace, verb: str, model: Any, plan: DataPlan) -> list[str]:
    """Say what of the settings the planned run cannot do, or would never look at.

    Args:
        settings: The verb's.
        verb: fit, validate, test or predict.
        model: The module.
        plan: What the data module planned.
    """
    optimizer = settings.model.init_args.get("optimizer")
    path = str((optimizer or {}).get("class_path", ""))
    problems = strategy_problems(settings.trainer.strategy, settings.trainer.precision, model, path)
    if verb == "fit":
        at_end = {"validation", *(["test"] if settings.test_at_end else [])}
        answered = model.can_generate and settings.generations.test_rows
        names = [*model.evaluation_metrics, *(OF_ANSWERS if answered else [])]
        problems += target_problems(settings.targets, names, at_end & plan.num_rows.keys())
    measured = [f"val/{name}" for name in model.evaluation_metrics]
    for key in ("early_stopping", "checkpoint"):
        monitor = settings[key].monitor
        if monitor not in measured:
            known = nearest(monitor, measured) or f"; known: {', '.join(measured)}"
            problems.append(f"{key}.monitor: '{monitor}' is not measured{known}")
    if "validation" not in plan.num_rows and settings.early_stopping.patience is not None:
        problems.append(
            "early_stopping.patience: set, but data.split leaves no validation rows to watch; give a validation "
            "split, or early_stopping.patience: null"
        )
    tests = verb == "test" or (verb == "fit" and settings.test_at_end)
    needed = "test" if tests else {"validate": "validation"}.get(verb)
    if needed and needed not in plan.num_rows:
        asked = "test" if tests else verb
        problems.append(
            f"data.split: there is nothing to {asked}: the data has {', '.join(plan.num_rows)} but no {needed} rows"
        )
    return problems


def target_problems(
    targets: Mapping[str, float], measured: Iterable[str], splits: Collection[str]
) -> list[str]:
    """Say which targets nothing will be held against.

    Args:
        targets: Values to reach, by metric.
        measured: What the module measures of a split; and ``test/exact_match`` where test rows are answered.
        splits: The splits it will be measured on at the end.
    """
    prefixes = [prefix for prefix, s in (("val", "validation"), ("test", "test")) if s in splits]
    names = [name for name in measured if "/" not in name]
    known = [f"{prefix}/{name}" for prefix in prefixes for name in names]
    known += [name for name in measured if "/" in name and name.split("/")[0] in prefixes]
    problems = []
    for name, target in targets.items():
        if name not in known:
            later = name.startswith("test/") and "test" not in prefixes
            hint = "; set test_at_end: true" if later else nearest(name, known)
            problems.append(f"targets: '{name}' is not measured{hint}; known: {', '.join(known)}")
        if math.isnan(target):
            problems.append(f"targets: {name}: a number is wanted, got nan")
    return problems
