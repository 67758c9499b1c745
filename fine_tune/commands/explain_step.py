"""``explain-step``: the rows behind one optimizer step of a run, where they come from, what the model saw."""

import argparse
import csv
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fine_tune.callbacks.step_rows import FOLDER, gap_around, recorded_steps, rows_of_step
from fine_tune.commands.shown_rows import shown_row
from fine_tune.data.encode_rows import column
from fine_tune.errors import UserError
from fine_tune.exits import exit_code
from fine_tune.loggers import METRICS_FILE
from fine_tune.modules.run_identity import differences
from fine_tune.prepared_cli import prepare_as_fit
from fine_tune.printable import printable
from fine_tune.runs.find import find_run
from fine_tune.runs.run_folder import LOGS, RECORD, RunFolder

# The data does not depend on the machine, and the run's may not be at hand.
ANY_MACHINE = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"),
    *("--trainer.num_nodes", "1", "--trainer.precision", "32-true", "--ckpt_path", "null"),
]
SHOWN_METRICS = ("epoch", "train/loss", "lr", "grad_norm")


def main(args: list[str]) -> int:
    """Print the rows of one step; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune explain-step", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", help="A run folder, or <name>, or <name>/version_N.")
    parser.add_argument("step", type=int, help="The optimizer step, from 1, as in metrics.csv.")
    parser.add_argument(
        "--root", type=Path, default=Path("."), help=f"The folder that holds {LOGS}."
    )
    own = parser.parse_args(args[1:])
    return exit_code(lambda: explain_step(own.run, own.step, own.root))


def explain_step(run_name: str, step: int, root: Path) -> None:
    """Print the rows a step was given: per rank their ids, then each with its place, length and text.

    Args:
        run_name: A run folder, a run's name (its newest version), or name and version.
        step: The optimizer step, from 1.
        root: Folder that holds ``lightning_logs``.

    Raises:
        UserError: No such run or step, or the data is no longer what the run was trained on.
    """
    run = RunFolder(find_run(run_name, root).path.resolve())
    by_rank = _rows(run, step)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with chdir(run.directory):  # the config's paths start there
        data = _data(run)
        console.print(f"step {step} of {run.path}")
        for line in [*_facts(run, step), *_ids(by_rank), _recipe(data, step, by_rank), ""]:
            console.print(line)
        rows = data.rows("train")
        ids_of_rows = column(rows, "row_id")
        # a row of packed texts is handed out as its pieces
        row_ids = list(dict.fromkeys(row_id for ids in by_rank.values() for row_id in ids))
        for row_id, where in zip(row_ids, data.locate_rows(row_ids), strict=True):
            row = rows[int(np.flatnonzero(ids_of_rows == row_id)[0])]
            title = f"row id {row_id}, {printable(where)}"
            console.print(shown_row(row, data.tokenizer, title))


def _rows(run: RunFolder, step: int) -> dict[int, list[int]]:
    by_rank = rows_of_step(run.path / FOLDER, step)
    if not by_rank:
        recorded = recorded_steps(run.path / FOLDER)
        if recorded is None:
            raise UserError(f"step: {run.path} has no record of its steps' rows")
        gap = gap_around(run.path / FOLDER, step) if step > 0 else None
        if gap is not None:
            raise UserError(
                f"step: {run.path} has no record of the rows of steps {gap[0]} to {gap[1]}, which could not be written "
                f"(see train.log), asked for {step}"
            )
        raise UserError(
            f"step: {run.path} has rows of steps {recorded[0]} to {recorded[1]}, asked for {step}"
        )
    return by_rank


def _data(run: RunFolder) -> Any:
    then, config = run.read().get("identity"), run.path / "config.yaml"
    if not then or not config.is_file():
        raise UserError(
            f"run: {run.path} has no config.yaml, or its {RECORD} does not say what its data was"
        )
    data = prepare_as_fit(["--config", str(config), *ANY_MACHINE]).datamodule
    changed = differences(then, {**then, **data.content})
    if changed:
        raise UserError(
            *(f"{change.key}: is not what the run was trained on any more" for change in changed),
            "data: the rows of a step cannot be shown; put the data back as it was",
        )
    return data


def _facts(run: RunFolder, step: int) -> list[str]:
    lines, row = [], dict[str, str]()
    if (metrics := run.path / METRICS_FILE).is_file():
        with open(metrics, newline="") as handle:
            found = (row for row in csv.DictReader(handle) if row.get("step") == str(step))
            row = next(found, {})
    shown = [f"{name} {row[name]}" for name in SHOWN_METRICS if row.get(name)]
    unknown = "its loss was not logged (trainer.log_every_n_steps)"
    if not metrics.is_file():
        unknown = f"its loss is not known: {metrics} is missing"
    lines.append("  ".join(shown) or unknown)
    record = run.read()
    for name in ("events", "changes"):
        for entry in (e for e in record.get(name, []) if e["step"] == step):
            told = (
                entry.get("event")
                or f"{entry['key']}: {entry['from']} until here, then {entry['to']}"
            )
            lines.append(printable(told))
    return lines


def _ids(by_rank: dict[int, list[int]]) -> list[str]:
    count = sum(len(ids) for ids in by_rank.values())
    lines = [f"{count} rows over {len(by_rank)} process(es)"]
    return lines + [f"  rank {rank}: {', '.join(map(str, ids))}" for rank, ids in by_rank.items()]


def _recipe(data: Any, step: int, by_rank: dict[int, list[int]]) -> str:
    data.setup("fit")
    indices = data.train_dataloader().sampler.rows_of_step(step - 1)
    computed = sorted(column(data.rows("train"), "row_id")[indices].tolist())
    if computed == sorted(row_id for ids in by_rank.values() for row_id in ids):
        return "the same rows follow from data.seed, data.batch_size and the data"
    return "WARNING: other rows follow from the run's settings as they are now (see changes in run.json)"
