"""What a run folder says, read into one object; files that are missing or cut say less, and that is noted."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fine_tune.runs.results import is_of_own_rows
from fine_tune.runs.run_folder import RECORD, RunFolder, status_of
from fine_tune.runs.run_lock import is_owned

METRICS, CONFIG, AUDIT, ANSWERS = "metrics.csv", "config.yaml", "data.json", "generations.jsonl"
ADAPTER = "adapter_config.json"
OPTIONAL = (ANSWERS, ADAPTER)  # nobody may have been asked; all weights may be trained
LISTS = ("results", "events", "starts", "commands", "changes", "parents", "test_openings")
MAPPINGS = ("environment", "num_rows", "num_tokens", "num_supervised", "model", "energy")
LARGEST = 1e100  # what no run computes, and nothing draws
NUMBERS = ("step", "num_steps", "steps_per_epoch", "seconds", "best_step", "best_score")


@dataclass(frozen=True)
class Curve:
    """A metric over optimizer steps, in their order."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> "Curve":
        """Return the curve without values that are no finite numbers."""
        kept = np.isfinite(self.values)
        return Curve(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Args:
        path: The run folder.
        record: ``run.json``; entries of a wrong type are left out.
        config: ``config.yaml``.
        metrics: Rows of ``metrics.csv`` by step, numbers only.
        audit: ``data.json``.
        answers: ``generations.jsonl``.
        adapter: ``adapter_config.json`` of the last checkpoint.
        is_owned: Whether a process may be writing into the folder.
        missing: Files that are not there.
        damaged: Files that cannot be read as a whole.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    is_owned: bool = False
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return RunFolder(self.path).name

    @property
    def status(self) -> str:
        """``finished``, ``stopped``, ``failed``, ``running``, ``killed`` (nobody runs it any more), or ``empty``."""
        return status_of(self.record, is_owned=self.is_owned)

    @property
    def step(self) -> int:
        """Optimizer steps taken, as far as the files tell."""
        logged = int(self.metrics[-1]["step"]) if self.metrics else 0
        known = int(self.record.get("step") or 0)
        return known if self.status in ("finished", "stopped", "failed") and known else logged

    @property
    def num_steps(self) -> int:
        return int(self.record.get("num_steps") or 0)

    def curve(self, name: str) -> Curve:
        """Return a column of ``metrics.csv`` where it has values."""
        rows = [(row["step"], row[name]) for row in self.metrics if name in row]
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return Curve(np.array(steps, dtype=int), np.array(values, dtype=float))

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a setting of ``config.yaml`` by its name on the command line, like ``data.batch_size``."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict):
                return default
            inner = value.get("init_args")
            value = value.get(part, inner.get(part) if isinstance(inner, dict) else None)
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """Return a setting that has to be a number; None where it is not."""
        value = self.setting(key)
        return value if is_number(value) else None

    def own_results(self, split: str) -> list[dict[str, Any]]:
        """Return what was measured of the run's own rows of a split, and not of others, oldest first."""
        return [r for r in self.results(split) if is_of_own_rows(self.record, r)]

    def results(self, split: str) -> list[dict[str, Any]]:
        """Return what was measured of a split after training, oldest first."""
        found = []
        for result in self.record.get("results", []):
            metrics = result.get("metrics")
            if result.get("split") == split and isinstance(metrics, dict):
                numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
                found.append({**result, "metrics": numbers})
        return found


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def read_run(path: Path) -> RunRecord:
    """Read what a run folder holds.

    Args:
        path: A run folder; finished, running, killed at any instant, or empty.
    """
    missing: list[str] = []
    damaged: list[str] = []

    def read(name: str, parse: Callable[[str], Any], empty: Any) -> Any:
        try:
            text = (path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            missing.extend([name] if Path(name).name not in OPTIONAL else [])
            return empty
        except (OSError, ValueError):  # ValueError: no name of a file
            damaged.append(name)
            return empty
        try:
            value = parse(text)
        except (ValueError, csv.Error, yaml.YAMLError, RecursionError):
            value = None
        if isinstance(value, type(empty)):
            return value
        damaged.append(name)
        return empty

    answers, cut = read(ANSWERS, _json_lines, ([], 0))
    metrics, broken = read(METRICS, _rows, ([], 0))
    damaged += [name for name, count in ((METRICS, broken), (ANSWERS, cut)) if count]
    record = _typed(read(RECORD, json.loads, {}))
    last = Path(str(record.get("last"))).name  # of the run's own checkpoints, whatever stands there
    return RunRecord(
        path,
        record=record,
        config=read(CONFIG, yaml.safe_load, {}),
        metrics=metrics,
        audit=read(AUDIT, json.loads, {}),
        answers=answers,
        adapter=read(f"checkpoints/{last}/{ADAPTER}", json.loads, {}),
        is_owned=is_owned(path),
        missing=missing,
        damaged=damaged,
    )


def _typed(record: dict[str, Any]) -> dict[str, Any]:
    """Keep the entries that are of the type a run writes."""
    kinds: dict[str, Any] = {name: list for name in LISTS} | {name: dict for name in MAPPINGS}
    kept = {k: v for k, v in record.items() if isinstance(v, kinds.get(k, object))}
    kept = {k: v for k, v in kept.items() if k not in NUMBERS or is_number(v)}
    for name in kept.keys() & set(LISTS):
        kept[name] = [item for item in kept[name] if isinstance(item, dict)]
    return kept


def _rows(text: str) -> tuple[list[dict[str, float]], int]:
    """Parse ``metrics.csv``; a value that is no number is left out, a row without a step is counted as broken."""
    by_step: dict[int, dict[str, float]] = {}
    broken = 0
    for texts in csv.DictReader(text.splitlines()):
        row = {name: _number(value) for name, value in texts.items() if name and value}
        numbers = {name: value for name, value in row.items() if value is not None}
        broken += len(numbers) < len(row)
        if is_number(numbers.get("step")):
            by_step.setdefault(int(numbers["step"]), {}).update(numbers)
        elif texts:
            broken += 1
    return [by_step[step] for step in sorted(by_step)], broken


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return None if LARGEST < abs(number) < np.inf else number


def _json_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    answers, cut = [], 0
    for line in text.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            cut += 1
            continue
        if isinstance(answer, dict):
            answers.append(answer)
    return answers, cut
