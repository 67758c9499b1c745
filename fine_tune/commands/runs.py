"""``runs``: every run under lightning_logs, what became of it and what it measured; filter, sort, compare."""

import argparse
import json
import math
import sys
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fine_tune.errors import UserError, nearest
from fine_tune.printable import printable
from fine_tune.runs.find import find_run
from fine_tune.runs.listing import WRONG, Listed, headline, list_runs, numbers
from fine_tune.runs.results import own_results
from fine_tune.runs.run_folder import LOGS, RECORD, RunFolder

TEXTS = ["run", "status", "model", "data", "started"]
SHOWN = {"time": "seconds", "opened": "test_openings", "test": "test"}  # columns, by what they show
COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "killed": "red"}


def main(args: list[str]) -> int:
    """Print the list; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune runs", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="KEY=PATTERN",
        help=f"Only these, like status=resumable or model=*phi*; keys: {', '.join(TEXTS)}. May be repeated.",
    )
    parser.add_argument(
        "--sort",
        default="started",
        metavar="KEY",
        help="started (newest first), a column, best, or a metric like test/loss; --sort=-KEY: the other way round.",
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="Show where these runs differ."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument(
        "--root", type=Path, default=Path("."), help=f"The folder that holds {LOGS}."
    )
    own = parser.parse_args(args[1:])
    try:
        if own.compare:
            return _compare(own.compare, own.root, as_json=own.json)
        _list(own.root, own.filter, own.sort, as_json=own.json)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def _list(root: Path, filters: list[str], sort: str, *, as_json: bool) -> None:
    runs, problems = list_runs(root)
    for problem in problems:
        print(f"WARNING: {printable(problem)}", file=sys.stderr)
    runs = _sorted([run for run in runs if _passes(run, filters)], sort)
    if as_json:
        _print_json(runs)
    elif not runs:
        print(f"no runs under {root / LOGS}" + (" pass the filter" if filters else ""))
    else:
        _console().print(_table(runs))


def _passes(run: Listed, filters: list[str]) -> bool:
    for given in filters:
        key, equals, pattern = given.partition("=")
        if key not in TEXTS:
            raise UserError(
                f"--filter: '{given}' is not KEY=PATTERN{nearest(key, TEXTS) or '; keys: ' + ', '.join(TEXTS)}"
            )
        if not pattern:
            wrong = (
                f"the pattern of '{given}' is empty" if equals else f"'{given}' is not KEY=PATTERN"
            )
            raise UserError(f"--filter: {wrong}; give one, like {key}=*text*")
        texts = [str(run[key] or "")]
        if key == "status" and run["resumable"]:
            texts += ["resumable", f"{run[key]}, resumable"]  # as the table shows it
        if not any(fnmatch(text, pattern) for text in texts):
            return False
    return True


def _sorted(runs: list[Listed], sort: str) -> list[Listed]:
    key, backwards = sort.removeprefix("-"), sort.startswith("-")
    if key in TEXTS:
        return sorted(
            runs, key=lambda run: str(run[key] or ""), reverse=(key == "started") != backwards
        )
    key = SHOWN.get(key, key)
    known = sorted({name for run in runs for name, _ in numbers(run)})
    if runs and key not in [*known, *SHOWN.values(), "best", "step"]:
        names = [*TEXTS, *SHOWN, *known]
        raise UserError(
            f"--sort: no run has '{key}'{nearest(key, names) or '; known: ' + ', '.join(names)}"
        )
    values = {run["run"]: dict(numbers(run)).get(key) for run in runs}
    have = [run for run in runs if values[run["run"]] is not None]
    have.sort(key=lambda run: values[run["run"]], reverse=backwards)  # type: ignore[arg-type, return-value]
    return have + [run for run in runs if values[run["run"]] is None]


def _table(runs: list[Listed]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for name in (
        "run",
        "status",
        "step",
        "model",
        "data",
        "best",
        "test",
        "opened",
        "time",
        "started",
    ):
        justify: Any = "right" if name in ("step", "opened", "time") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "run")
    for run in runs:
        status = f"{run['status']}{', resumable' if run['resumable'] else ''}"
        first = headline(run)
        test = f"{first.removeprefix('test/')} {run['test'][first]:.4g}" if first else ""
        cells = [
            run["run"],
            Text(printable(status), style=COLOURS.get(run["status"], "yellow")),
            f"{run['step']:,}/{run['num_steps']:,}" if run["num_steps"] else "",
            run["model"],
            run["data"],
            f"{run['monitor']} {run['best']:.4g}" if run["best"] is not None else "",
            test,
            f"{run['test_openings']}x" if run["test_openings"] else "",
            str(timedelta(seconds=round(run["seconds"]))) if run["seconds"] is not None else "",
            (run["started"] or "")[:16].replace("T", " "),
        ]
        table.add_row(
            *(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in cells)
        )
    return table


def _compare(names: list[str], root: Path, *, as_json: bool) -> int:
    """Show every setting and metric in which runs differ, side by side."""
    folders = [find_run(name, root) for name in names]
    if len(folders) < 2:
        raise UserError(f"--compare: give two runs or more, got '{folders[0].name}' alone")
    titles = [run.name for run in folders]
    facts = [_facts(run) for run in folders]
    keys = list(dict.fromkeys(key for of_run in facts for key in of_run))
    different = {
        key: [of_run.get(key) for of_run in facts]
        for key in keys
        if len({json.dumps(of_run.get(key), sort_keys=True) for of_run in facts}) > 1
    }
    if as_json:
        _print_json({"runs": titles, "different": different})
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("", *titles):
        table.add_column(Text(printable(title)), overflow="fold")
    for key, values in different.items():
        table.add_row(Text(printable(key)), *(Text(_shown(value)) for value in values))
    _console().print(table if different else "no setting or metric differs")
    return 0


def _facts(run: RunFolder) -> dict[str, Any]:
    record = run.read()
    try:
        facts = dict(record.get("identity", {}))
        for result in own_results(record):
            facts |= result["metrics"]
    except WRONG as error:
        raise UserError(f"{run.path / RECORD}: the run's record is damaged: {error!r}") from error
    return facts | {"best step": record.get("best_step"), "seconds": record.get("seconds")}


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """Put null where a diverged run has NaN or an infinity, which JSON knows nothing of."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return printable(text if len(text) <= 200 else f"{text[:199]}…")


def _console() -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as the lines are."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 220)
