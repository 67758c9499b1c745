"""Several runs side by side: what differs in their settings, what came of each, their curves in one drawing."""

import time
from typing import Any

from fine_tune import __version__
from fine_tune.report.blocks import Block, Charts, Page, Section, Sentences, Table
from fine_tune.report.charts import SERIES, Drawing, Line, draw, smoothed
from fine_tune.report.cost import commands, peak_gib, trained_tokens
from fine_tune.report.curves import in_words
from fine_tune.report.findings import analysis_of, sentence
from fine_tune.report.noise import window
from fine_tune.report.page import warnings_of
from fine_tune.report.record import RunRecord
from fine_tune.report.results import interval_of, shown_interval
from fine_tune.report.words import Words

LETTERS = "ABCDEF"
MOST_RUNS = len(LETTERS)
OF_THE_PLACE = ("trainer.default_root_dir", "data.cache_dir", "ckpt_path", "report")


def comparison_of(runs: list[RunRecord], words: Words) -> Page:
    """Put the comparison of two to six runs together.

    Args:
        runs: In the order of their columns.
        words: The language.
    """
    names = [f"{letter}: {run.name}" for letter, run in zip(LETTERS, runs, strict=False)]
    found = [analysis_of(run) for run in runs]
    told = [
        (each.main.tone, f"{name}: {sentence(each.main, words)}")
        for name, each in zip(names, found, strict=True)
    ]
    verdicts = [words(f"short_{each.verdict}") for each in found]
    sections = [
        Section("results", words("comparison"), [_results(runs, names, verdicts, words)]),
        Section("analysis", words("analysis"), [Sentences(told)]),
        Section("curves", words("curves"), _curves(runs, words)),
        Section("settings", words("config_differences"), _settings(runs, names, words)),
    ]
    warnings: list[str] = []
    for name, run in zip(names, runs, strict=True):
        warnings += [f"{name}: {warning}" for warning in warnings_of(run, words)]
        sections.append(
            Section(
                f"commands_{name[0]}", f"{words('commands')} {name}", commands(run, words).blocks
            )
        )
    return Page(
        language=words.language,
        title=" · ".join(names),
        status=words("comparison"),
        tone="note",
        lead=[words("compared", count=len(runs))],
        cards=[],
        sections=sections,
        footer=words("made", version=__version__, time=time.strftime("%Y-%m-%d %H:%M")),
        warnings=warnings,
    )


def differences(runs: list[RunRecord]) -> tuple[dict[str, list[Any]], int]:
    """Return the settings that are not the same in all runs, each with its values, and how many are the same."""
    flat = [_flat(run.config) for run in runs]
    keys = sorted(set().union(*flat) - set(OF_THE_PLACE))
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    differing = {key: row for key, row in values.items() if any(value != row[0] for value in row)}
    return differing, len(keys) - len(differing)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Name settings as on the command line: of model.init_args.optimizer.init_args.lr, model.optimizer.lr."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        found |= _flat(value, inner)
    return found


def _settings(runs: list[RunRecord], names: list[str], words: Words) -> list[Block]:
    lost = [name for name, run in zip(names, runs, strict=True) if not run.config]
    read = [name for name in names if name not in lost]
    told = [words("config_lost", name=name) for name in lost]
    differing, same = differences([run for run in runs if run.config])
    if len(read) > 1 and not differing:
        told.append(words("config_equal"))
    blocks: list[Block] = [Sentences([("note", line) for line in told])] if told else []
    if not differing:
        return blocks
    rows = [[key, *(_shown(value, words) for value in values)] for key, values in differing.items()]
    table = Table(
        [words("setting"), *read],
        rows,
        num_text=1 + len(read),
        note=words("config_same", count=same),
        marked=frozenset(range(len(rows))),
        mark="differs",
    )
    return [*blocks, table]


def _results(runs: list[RunRecord], names: list[str], verdicts: list[str], words: Words) -> Table:
    rows = [
        [words("status"), *(words.known(f"status_{run.status}", run.status) for run in runs)],
        [words("verdict"), *verdicts],
        [
            words("step"),
            *(f"{words.number(run.step)} / {words.number(run.num_steps)}" for run in runs),
        ],
        [words("best_checkpoint"), *(_number(run.record.get("best_step"), words) for run in runs)],
        [words("time"), *(_seconds(run, words) for run in runs)],
        [words("trained_tokens"), *(_number(trained_tokens(run), words) for run in runs)],
        [words("peak_memory"), *(_peak(run, words) for run in runs)],
    ]
    measured = [_measured(run, words) for run in runs]
    for metric in dict.fromkeys(name for of_run in measured for name in of_run):
        rows.append([metric, *(of_run.get(metric, "") for of_run in measured)])
    marked = frozenset(i for i, row in enumerate(rows) if len(set(row[1:])) > 1)
    return Table(
        ["", *names],
        rows,
        num_text=1 + len(names),
        note=words("rows_differ"),
        marked=marked,
        mark="differs",
    )


def _measured(run: RunRecord, words: Words) -> dict[str, str]:
    shown = {}
    for split, prefix in (("validation", "val/"), ("test", "test/")):
        for result in run.own_results(split)[-1:]:
            for name, value in result["metrics"].items():
                if name.startswith(prefix) and not name.endswith(("_low", "_high")):
                    ends, _ = interval_of(run, result, name)
                    between = f" ({shown_interval(ends, words)})" if ends else ""
                    shown[name] = words.number(float(value)) + between
    return shown


def _curves(runs: list[RunRecord], words: Words) -> list[Block]:
    drawn = []
    for column, key in (
        ("train/loss", "train_loss"),
        ("val/loss", "val_loss"),
        ("lr", "lr"),
        ("grad_norm", "grad_norm"),
    ):
        lines, measured = [], []
        for letter, colour, run in zip(LETTERS, SERIES, runs, strict=False):
            curve = run.curve(column)
            measured.append(Line(letter, curve))  # told as it is in the tables, not smoothed
            if column == "train/loss":
                curve = smoothed(curve, window(curve))
            if len(curve.finite()):
                lines.append(Line(letter, curve, points=column == "val/loss", colour=colour))
        if lines:
            svg = draw(Drawing(lines, words("step"), localized=words.localized))
            drawn.append((words(key), svg, in_words(measured, words)))
    return [Charts(drawn)] if drawn else [Sentences([("note", words("no_metrics"))])]


def _number(value: Any, words: Words) -> str:
    return words.number(value) if isinstance(value, int | float) else words("unknown")


def _peak(run: RunRecord, words: Words) -> str:
    peak = peak_gib(run)
    return words("unknown") if peak is None else words("gib", value=peak)


def _seconds(run: RunRecord, words: Words) -> str:
    seconds = run.record.get("seconds")
    return words.seconds(seconds) if seconds else words("unknown")


def _shown(value: Any, words: Words) -> str:
    if value is None or isinstance(value, bool):
        return words("none") if value is None else words.number(value)
    return str(value)
