"""A sweep held against its config before anything is tried: keys, values, metrics, and what workers must share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError, nearest
from fine_tune.modules.run_identity import run_identity
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit
from fine_tune.sweeps.space import COSTS, Setting, Sweep
from fine_tune.sweeps.trial import OF_A_TRIAL, flags_of


def check_corners(file: str, searched: Sweep, settings: list[str]) -> None:
    """Let fit's own checks see every least, greatest and listed value, with the flags a trial will have.

    Raises:
        UserError: What they say of any of them.
    """
    problems: list[str] = []
    for setting in searched.corners():
        try:
            prepare_as_fit([*settings, *flags_of(setting), *OF_A_TRIAL])
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*(f"{file}: parameters: {told}" for told in dict.fromkeys(problems)))


def check_metrics(file: str, searched: Sweep, plan: PreparedCLI) -> None:
    """See that every metric will be there to compare settings by.

    Raises:
        UserError: One is not measured, or there are no validation rows.
    """
    known = [*(f"val/{name}" for name in plan.model.evaluation_metrics), *COSTS]
    problems = [
        f"{file}: metrics: '{name}' is not measured{nearest(name, known)}; known: {', '.join(known)}"
        for name in searched.metrics
        if name not in known
    ]
    if "validation" not in plan.plan.num_rows:
        problems.append("data.split: settings are compared on validation rows; the data has none")
    if problems:
        raise UserError(*problems)


def shipped_setting(plan: PreparedCLI, searched: Sweep) -> list[Setting]:
    """Return the config's own setting, where it lies in what is searched: it is tried first; else none."""
    setting = {key: _value_of(plan, key) for key in searched.parameters}
    for key, parameter in searched.parameters.items():
        try:
            inside = parameter._contains(parameter.to_internal_repr(setting[key]))
        except (ValueError, TypeError):
            inside = False
        if not inside:
            return []
    return [setting]


def _value_of(plan: PreparedCLI, key: str) -> Any:
    value: Any = plan.settings
    for name in key.split("."):
        if not hasattr(value, "get"):
            return None
        inner = value.get("init_args")
        value = inner.get(name) if hasattr(inner, "get") and name in inner else value.get(name)
    return value


def identity_of(file: str, plan: PreparedCLI) -> dict[str, str]:
    """Return hashes of what must be the same for all workers; where their files lie may differ, and the machine."""
    content = plan.datamodule.content
    run = run_identity(
        plan.settings.as_dict(), model=plan.model, data=content, num_steps=plan.plan.num_steps
    )
    parts = {
        "data": content,
        "config": {key: value for key, value in run.items() if key not in content},
        "sweep file": Path(file).read_text("utf-8"),
    }
    return {
        key: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for key, part in parts.items()
    }
