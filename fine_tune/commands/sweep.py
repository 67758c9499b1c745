"""``sweep``: search settings. Each trial is a run like any other, of one study that is resumed by the same command."""

import argparse
import sys
from importlib.util import find_spec

from fine_tune.exits import exit_code

HELP = "The other flags are those of fit: --config configs/x.yaml, --data.path rows.jsonl ... (fit --help)."


def main(args: list[str]) -> int:
    """Search, and print what came of it; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune sweep", description=__doc__, epilog=HELP, allow_abbrev=False
    )
    parser.add_argument(
        "--sweep", required=True, metavar="FILE", help="What is searched, and by what it is judged."
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=None,
        help="Settings to try, of all workers together. Default: 20, or a whole grid.",
    )
    parser.add_argument(
        "--storage",
        default=None,
        help="Where the study is kept, for workers on many machines: postgresql://USER:PASSWORD@HOST/DATABASE. "
        "Default: a file in the sweep's folder.",
    )
    parser.add_argument("--name", default=None, help="Of the sweep. Default: the sweep file's.")
    parser.add_argument(
        "--sampler_seed", type=int, default=0, help="Of the sampler: which settings it draws."
    )
    parser.add_argument(
        "--grace_seconds",
        type=int,
        default=60,
        help="A worker that gave no sign of life for so long is dead, and its trial is run again.",
    )
    parser.add_argument(
        "--test_winner",
        action="store_true",
        help="Open the test split at the end, once, for the best setting.",
    )
    own, settings = parser.parse_known_args(args[1:])
    if find_spec("optuna") is None:
        print("error: sweep needs optuna: pip install 'fine-tune[sweep]'", file=sys.stderr)
        return 2
    from fine_tune.sweeps.search import search

    return exit_code(lambda: search(own, settings))
