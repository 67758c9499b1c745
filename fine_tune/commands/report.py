"""``report``: what became of a run, as one page that needs nothing else; several runs side by side."""

import argparse
import sys
from pathlib import Path

from fine_tune.errors import UserError
from fine_tune.printable import printable
from fine_tune.report.cost import grid_problems
from fine_tune.report.words import LANGUAGES
from fine_tune.report.write import write_comparison, write_report
from fine_tune.runs.find import find_run
from fine_tune.runs.run_folder import LOGS


def main(args: list[str]) -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune report", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", nargs="+", help="A run folder, or <name>, or <name>/version_N.")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="English or Indonesian."
    )
    parser.add_argument(
        "--every",
        type=int,
        help="Steps between two rows of the table of steps; rounded up to whole logging intervals.",
    )
    parser.add_argument(
        "--grid_gco2e_per_kwh",
        type=float,
        help="Grams of CO2e per kWh of your grid, where energy was measured.",
    )
    parser.add_argument(
        "--output", type=Path, help="Folder to write into. Without it: the (first) run's."
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help=f"The folder that holds {LOGS}."
    )
    own = parser.parse_args(args[1:])
    try:
        if own.every is not None and own.every < 1:
            raise UserError(f"--every: must be at least 1, got {own.every}")
        grid = own.grid_gco2e_per_kwh
        if problems := grid_problems(grid):
            raise UserError(*problems)
        if problems := _for_one_run(own):
            raise UserError(*problems)
        folders = [find_run(name, own.root).path for name in own.run]
        if len(folders) > 1:
            file = write_comparison(folders, own.language, own.output)
        else:
            file = write_report(folders[0], own.language, own.every, grid, own.output)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"report: {printable(str(file))}")
    return 0


def _for_one_run(own: argparse.Namespace) -> list[str]:
    """Name the flags that were given although a page of several runs has nothing of theirs."""
    if len(own.run) < 2:
        return []
    given = [flag for flag in ("every", "grid_gco2e_per_kwh") if getattr(own, flag) is not None]
    told = f"is for the report of one run, and {len(own.run)} are given; leave it out"
    return [f"--{flag}: {told}" for flag in given]
