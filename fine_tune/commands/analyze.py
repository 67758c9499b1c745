"""``analyze``: what there is to know of the data before training on it, and what ``fit`` would choose by it."""

import argparse
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fine_tune import summary
from fine_tune.batches import DataPlan
from fine_tune.commands.shown_rows import shown_row
from fine_tune.exits import exit_code
from fine_tune.prepared_cli import prepare_as_fit
from fine_tune.printable import printable
from fine_tune.settings import read_yaml, split_flags

BAR_WIDTH = 40
SHOWN_PAIRS = 5
HELP = "The other flags are those of fit: --config configs/x.yaml, --data.path rows.jsonl ... (fit --help)."


def main(args: list[str]) -> int:
    """Print what is known of the data; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune analyze", description=__doc__, epilog=HELP, allow_abbrev=False
    )
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        help="Training rows to print, their supervised tokens coloured.",
    )
    own, settings = parser.parse_known_args(args[1:])
    if own.show < 0:
        parser.error(f"--show: must not be negative, got {own.show}")
    return exit_code(lambda: analyze(settings, own.show))


def analyze(settings: list[str], show: int) -> None:
    """Prepare the data as ``fit`` would, and print what there is to know of it.

    Args:
        settings: Flags of ``fit``.
        show: Training rows to print.
    """
    run = prepare_as_fit(settings + _count_empty_completions(settings))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    audit = run.datamodule.prepared.facts["audit"]
    chosen = ["fit would choose", *(f"  {line}" for line in summary.choices(run.chosen))]
    noticed = ["noticed", *(f"  {line}" for line in run.plan.notes)]
    parts = [_of_train(audit, run.plan), _of_splits(audit), _leakage(audit["leakage"])]
    if audit["preferences"]:
        parts.insert(1, _preferences(audit["preferences"]))
    for part in [*parts, chosen if run.chosen else [], noticed if run.plan.notes else []]:
        for line in part:
            console.print(line)
        console.print()
    for row in _rows(run.datamodule, show):
        console.print(row)


def _count_empty_completions(settings: list[str]) -> list[str]:
    # fit refuses such rows; here they are counted, unless the user decided
    flags, files = split_flags(settings)
    given = [*flags, *(setting for file in files for setting in read_yaml(file)[0])]
    decided = any(setting.key == "data.empty_completions" for setting in given)
    texts = any(
        setting.key in ("data", "data.class_path") and str(setting.value).endswith("TextData")
        for setting in given
    )
    return [] if decided or texts else ["--data.empty_completions", "drop"]


def _of_train(audit: dict[str, Any], plan: DataPlan) -> Iterator[str]:
    empty, repeated, length = audit["empty_completions"], audit["repeated_rows"], audit["length"]
    supervised_share = audit["supervised_tokens"] / audit["tokens"]
    for name, counts in audit["rows"].items():
        sealed = f"   sealed: {plan.test_hash[:8]}" if name == "test" and plan.test_hash else ""
        yield f"{name:<13}{counts:>9,} rows{sealed}"
    if empty:
        what = "empty or same" if audit["preferences"] else "empty"
        yield f"{what:<13}{empty:>9,} rows: fit refuses them, --data.empty_completions drop leaves them out"
    yield ""
    yield "training rows"
    yield f"  tokens       {audit['tokens']:,}, {supervised_share:.1%} of them supervised"
    yield f"  length       {_statistics(length)}"
    yield f"  supervised   {_statistics(audit['supervised_length'])}"
    yield f"  repeated     {repeated['repeated']:,} repeat an earlier row, {repeated['near']:,} nearly"
    yield (
        f"  truncation   to {plan.max_length:,} tokens: {audit['truncated_rows_share']:.1%} of rows, "
        f"{audit['supervised_tokens_lost_share']:.1%} of supervised tokens lost, "
        f"{audit['too_long_rows']:,} rows left out"
    )
    yield "  tokens per row"
    edges, counts = length["histogram"]["edges"], length["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "\u2588" * round(BAR_WIDTH * count / max(counts))
        yield f"  {low:>8,.0f} \u2013{high - 1:>7,.0f}  {count:>8,}  {bar}"


def _preferences(found: dict[str, Any]) -> Iterator[str]:
    yield "training pairs"
    yield f"  prompts      {found['num_prompts']:,}, at most {found['most_pairs_of_a_prompt']:,} pairs of one"
    yield (
        f"  left out     {found['empty_answers']:,} pairs with an empty answer, {found['same_answers']:,} with twice "
        "the same (in all splits)"
    )
    yield (
        f"  cut          one answer of {found['one_answer_cut']:,} pairs, both of {found['both_answers_cut']:,}; "
        f"turned round by another pair: {found['contradictory']:,}"
    )
    yield f"  chosen       {_statistics(found['chosen_length'])}"
    yield f"  rejected     {_statistics(found['rejected_length'])}"
    yield (
        f"  length bias  'always the longer' is right for {found['longer_chosen']:.1%} of the pairs that differ in "
        f"length ({found['same_length']:.1%} do not)"
    )


def _of_splits(audit: dict[str, Any]) -> Iterator[Any]:
    table = Table(title="splits side by side", title_justify="left", box=None, pad_edge=False)
    for name in (
        "split",
        "rows",
        "length mean",
        "median",
        "p95",
        "max",
        "supervised mean",
        "median",
    ):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, of_split in audit["splits"].items():
        length, supervised = of_split["length"], of_split["supervised_length"]
        numbers = [length[k] for k in ("mean", "median", "p95", "max")]
        numbers += [supervised["mean"], supervised["median"]]
        table.add_row(split, f"{audit['rows'][split]:,}", *(f"{n:,.1f}" for n in numbers))
    yield table
    for what in ("sources", "strata"):
        for split, of_split in audit["splits"].items():
            if len(of_split[what]) > 1:
                shares = ", ".join(f"{name} {share:.1%}" for name, share in of_split[what].items())
                yield Text(f"  {what} of {split}: {printable(shares)}")
    for split, tests in audit["drift"].items():
        shown = ", ".join(
            f"{what.replace('num_', '')} distance {t['distance']:.3f} (p {t['p_value']:.2g})"
            for what, t in tests.items()
        )
        yield f"  drift of {split} against train: {shown}"


def _leakage(leakage: dict[str, Any]) -> Iterator[Any]:
    yield f"leakage (equal words, or at least {leakage['threshold']:g} of their word pairs in common)"
    for names, sides in leakage["between"].items():
        _, second = names.split("/")
        of_second = sides[second]
        yield f"  {names}: {of_second['exact']:,} rows of {second} stand in both, {of_second['near']:,} nearly"
    for pair in leakage["pairs"][:SHOWN_PAIRS]:
        first, second = (
            f"{pair[side]['split']} {pair[side]['source']} row {pair[side]['row']}"
            for side in ("first", "second")
        )
        yield Text(printable(f"    {pair['similarity']:.2f}  {first}  ~  {second}"))
    if leakage["num_pairs"] > SHOWN_PAIRS:
        yield f"    ... {leakage['num_pairs']:,} pairs in all, in data.json of the run folder"
    if leakage["dropped_from_train"]:
        yield f"  {leakage['dropped_from_train']:,} rows were left out of train for it"


def _rows(data: Any, show: int) -> Iterator[Text]:
    rows = data.rows("train")
    for index in range(min(show, len(rows))):
        row = rows[index]
        yield shown_row(row, data.tokenizer, f"row id {row['row_id']}")


def _statistics(of: dict[str, Any]) -> str:
    names = ("min", "mean", "median", "p90", "p95", "p99", "max")
    return "  ".join(f"{name} {of[name]:,.4g}" for name in names)
