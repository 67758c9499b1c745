"""All runs under ``lightning_logs`` at a glance, from their records; reads as little as that takes."""

import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fine_tune.errors import UserError
from fine_tune.runs.openings import OPENINGS_FILE, TEST_SPLITS, read_openings
from fine_tune.runs.results import own_results
from fine_tune.runs.run_folder import LOGS, RECORD, RunFolder, status_of
from fine_tune.runs.run_lock import is_owned

Listed = dict[str, Any]
HEADLINES = ("test/exact_match", "test/rewards_accuracy", "test/loss")  # what is looked at first
WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError)
RESUMABLE = ("stopped", "failed", "killed")


def list_runs(root: Path) -> tuple[list[Listed], list[str]]:
    """Describe every run under a root, the newest first.

    Returns:
        One flat description per run: ``run``, ``status`` (running, finished, stopped, failed, killed, empty),
        ``resumable``, ``step``, ``num_steps``, ``model``, ``data``, ``monitor``, ``best``, ``test``,
        ``test_openings`` (of its test split: by all runs that are still there, and those noted beside the sealed split,
        where those of deleted runs and outside any run are), ``started``, ``seconds``, ``path``; and a line for each
        record or list of openings that cannot be read.
    """
    problems: list[str] = []
    records = {}
    for file in sorted((root / LOGS).glob(f"*/version_*/{RECORD}")):
        try:
            records[file.parent] = RunFolder(file.parent).read()
        except UserError as error:
            problems += error.problems
    configs = {path: _config(path) for path in records}
    opened: dict[str, set[str]] = {}
    splits: set[Path] = set()
    for path, record in records.items():
        try:
            _note_openings(record, opened)
            splits |= _opened_splits(path, record, configs[path])
        except WRONG as error:
            problems.append(f"{path / RECORD}: its test openings are not counted: {error!r}")
    for split in sorted(splits):
        try:
            _note_openings_beside(split, opened)
        except (OSError, *WRONG) as error:
            problems.append(f"{split / OPENINGS_FILE}: its openings are not counted: {error!r}")
    found = []
    for path, record in records.items():
        try:
            found.append(_describe(path, record, configs[path], opened))
        except WRONG as error:
            problems.append(f"{path / RECORD}: the run's record is damaged: {error!r}")
    return sorted(found, key=lambda run: run["started"] or "", reverse=True), problems


def _describe(
    path: Path, record: dict[str, Any], config: dict[str, Any], opened: dict[str, set[str]]
) -> Listed:
    run = RunFolder(path)
    status = status_of(record, is_owned=is_owned(path))
    tests = [result for result in own_results(record) if result["split"] == "test"]
    metrics = tests[-1]["metrics"] if tests else {}
    hashes = {opening.get("test_hash") for opening in record.get("test_openings", [])}
    starts = record.get("starts", [])
    last = record.get("last")
    newest = next((c["step"] for c in record.get("checkpoints", []) if c["name"] == last), 0)
    return {
        "run": run.name,
        "status": status,
        "resumable": status in RESUMABLE and run.checkpoint("last") is not None,
        "step": int(newest if status in ("running", "killed") else record.get("step", newest)),
        "num_steps": _number(record.get("num_steps")),
        "model": _model(config),
        "data": _data(config),
        "monitor": record.get("monitor"),
        "best": _number(record.get("best_score")),
        "test": {name: _number(v) for name, v in metrics.items() if name.startswith("test/")},
        "test_openings": max((len(opened[str(of_split)]) for of_split in hashes), default=0),
        "started": str(starts[0]["time"]) if starts else None,
        "seconds": _number(_seconds(record, status)),
        "path": str(path),
    }


def _note_openings(record: dict[str, Any], opened: dict[str, set[str]]) -> None:
    for opening in record.get("test_openings", []):
        opened.setdefault(str(opening.get("test_hash")), set()).add(str(opening.get("id")))


def _opened_splits(path: Path, record: dict[str, Any], config: dict[str, Any]) -> set[Path]:
    """Return the folders of the test splits that a run opened, which hold lists of all their openings."""
    cache = _settings(config, "data").get("cache_dir")
    hashes = {str(opening.get("test_hash")) for opening in record.get("test_openings", [])}
    if not cache or not hashes:
        return set()
    place = Path(RunFolder(path).directory, str(cache), TEST_SPLITS)
    return {place / of_split for of_split in hashes}


def _note_openings_beside(split: Path, opened: dict[str, set[str]]) -> None:
    opened[split.name] |= {str(opening["id"]) for opening in read_openings(split)}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _settings(config: dict[str, Any], section: str) -> dict[str, Any]:
    return dict((config.get(section) or {}).get("init_args") or {})


def _model(config: dict[str, Any]) -> str:
    model = _settings(config, "model")
    kind = str((config.get("model") or {}).get("class_path", "")).split(".")[-1]
    fields = model.get("from_config") or {}
    new = f"new {fields.get('model_type') or fields.get('class', 'model')}"
    name = _last_parts(str(model["model_name_or_path"])) if model.get("model_name_or_path") else new
    how = [
        part for part in (model.get("quantization"), "LoRA" if model.get("lora") else None) if part
    ]
    return " ".join([kind, name, *how]).strip() if config else ""


def _data(config: dict[str, Any]) -> str:
    data = _settings(config, "data")
    path = data.get("path")
    if data.get("sources"):
        return ", ".join(_last_parts(str(source.get("path"))) for source in data["sources"])
    if isinstance(path, dict):
        return _last_parts(str(path.get("train") or next(iter(path.values()), "")))
    return _last_parts(str(path)) if path else ""


def _last_parts(name: str) -> str:
    return "/".join(Path(name).parts[-2:])


def _seconds(record: dict[str, Any], status: str) -> Any:
    """Return the time spent training; of a killed run, until its last checkpoint."""
    before = record.get("seconds", 0.0)
    if status not in ("running", "killed") or not record.get("starts"):
        return record.get("seconds")
    begun = datetime.fromisoformat(record["starts"][-1]["time"])
    until = datetime.now().astimezone()
    if status == "killed":
        until = datetime.fromisoformat(record.get("last_saved") or record["starts"][-1]["time"])
    return before + max(0.0, (until - begun).total_seconds())


def _number(value: Any) -> Any:
    """Return a number that a run can have as it is; anything else is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) and abs(value) < 1e12 else None


def headline(run: Listed) -> str | None:
    """Name what is looked at first of what a run measured of its test split."""
    return next((name for name in HEADLINES if run["test"].get(name) is not None), None)


def numbers(run: Listed) -> Iterator[tuple[str, float]]:
    """Give every number of a description by the name it is sorted by."""
    for name in ("step", "seconds", "test_openings"):
        if run[name] is not None:
            yield name, run[name]
    if run["best"] is not None:
        yield "best", run["best"]
        yield str(run["monitor"]), run["best"]
    first = headline(run)
    if first is not None:
        yield "test", run["test"][first]
    yield from ((name, value) for name, value in run["test"].items() if value is not None)
