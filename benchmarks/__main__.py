"""``python -m benchmarks cpu [C1 ...]`` or ``gpu [G1 ...]``: rows of peer and ours; ``cpu growth``: how cost grows."""

import argparse
import sys
from pathlib import Path

from benchmarks import (
    checkpoint_stall,
    dpo,
    evaluation,
    growth,
    preparation,
    sft,
    time_to_resume,
)
from benchmarks.harness import REPOSITORY, Bench, empty_folder
from benchmarks.rows import ROWS, toy
from benchmarks.training import TrainingBench

CPU = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "growth")
GPU = ("G1", "G2", "G3", "G4", "G4-1.5B", "G5")


def main() -> None:
    """Run the rows that are asked for; without names, all of the machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("machine", choices=["cpu", "gpu"])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(CPU)}; {', '.join(GPU)}")
    parser.add_argument("--pairs", type=int, help="legs of each side; default 5, on a GPU 2")
    parser.add_argument("--threads", type=int, default=2, help="of each leg")
    parser.add_argument("--search", action="store_true", help="search the peer's best again")
    parser.add_argument("--toy", action="store_true", help="the same code at toy size, not kept")
    parser.add_argument("--ours", default="", help="more of our command line; not kept")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    asked = parser.parse_args()
    known = CPU if asked.machine == "cpu" else GPU
    unknown = [name for name in asked.rows if name not in known]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}: {asked.machine} has {', '.join(known)}")
    for name in asked.rows or known:
        print(f"\n{name}", flush=True)
        run(name, asked)


def run(name: str, asked: argparse.Namespace) -> None:
    """Run one row, and keep what it found out."""
    with empty_folder(name) as root:
        results = root / "results" if asked.toy else asked.results
        pairs = asked.pairs or (1 if asked.toy else 5)
        if name in ROWS:
            row = toy(ROWS[name]) if asked.toy else ROWS[name]
            training = TrainingBench(name, row, results, root, asked.threads)
            compare = dpo.compare if row.task == "DPO" else sft.compare
            compare(training, asked.pairs or row.pairs, asked.search, asked.ours)
            bench: Bench = training
        else:
            bench = Bench(name, results, root, threads=asked.threads)
            if name == "C5":
                preparation.compare(bench, pairs, 500 if asked.toy else preparation.NUM_ROWS)
            elif name == "C6":
                time_to_resume.compare(bench, pairs)
                checkpoint_stall.compare(bench, pairs)
            elif name == "growth":
                growth.compare(bench, asked.toy)
            else:
                num_rows = 20 if asked.toy else evaluation.NUM_ROWS
                evaluation.compare(bench, pairs, asked.search, num_rows)
        if not asked.ours:
            bench.keep()


if __name__ == "__main__":
    sys.exit(main())
