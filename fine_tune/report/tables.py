"""How training went, in tables: every N-th step, and every evaluation."""

from typing import Any

from fine_tune.report.blocks import Section, Sentences, Table
from fine_tune.report.noise import mean_until
from fine_tune.report.record import RunRecord
from fine_tune.report.words import Words

MOST_ROWS = 100
NICE = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10000)


def steps(run: RunRecord, words: Words, every: int | None) -> Section:
    """List every N-th step, whole logging intervals apart: loss, learning rate, gradient norm, epoch."""
    rows = [row for row in run.metrics if "train/loss" in row]
    if not rows:
        return Section("steps", words("steps"), [Sentences([("note", words("no_metrics"))])])
    logged = max(1, int(run.number("trainer.log_every_n_steps") or 1))
    every = -(-every // logged) * logged if every else interval(len(rows), logged)
    cells, final = [], int(rows[-1]["step"])
    for row in rows:
        step = int(row["step"])
        if step % every == 0 or step == final:
            numbers = [
                _cell(row, "train/loss", words),
                _rate(row, words),
                _cell(row, "grad_norm", words),
            ]
            cells.append([words.number(step), *numbers, _epoch(row, words)])
    head = [words(k) for k in ("step", "train_loss", "lr", "grad_norm", "epoch")]
    note = words("every_n", every=every, shown=len(cells), logged=len(rows))
    return Section("steps", words("steps"), [Table(head, cells, num_text=0, note=note)])


def interval(num_rows: int, logged: int) -> int:
    """Return the steps between two rows of the table: the logging interval, or a multiple that keeps it short."""
    return logged * next((n for n in NICE if num_rows / n <= MOST_ROWS), -(-num_rows // MOST_ROWS))


def evaluations(run: RunRecord, words: Words) -> Section:
    """List the evaluations during training: loss, gap, seconds, and what else was measured; the best one is marked."""
    validation, train = run.curve("val/loss"), run.curve("train/loss").finite()
    if not len(validation):
        return Section(
            "evaluation", words("evaluation"), [Sentences([("note", words("no_evaluation"))])]
        )
    names = _measured(run)
    rows: list[list[str]] = []
    marked = set()
    best = run.record.get("best_step")
    shown = _chosen([row for row in run.metrics if "val/loss" in row], best)
    for row in shown:
        step, loss = int(row["step"]), row["val/loss"]
        before = mean_until(train, step)
        cells = [words.number(step), _epoch(row, words), words.number(loss)]
        cells += (
            [words.number(before), words.number(before - loss)] if before is not None else ["", ""]
        )
        cells.append(_cell(row, "perf/evaluation_seconds", words))
        if step == best:
            marked.add(len(rows))
        rows.append([*cells, *(_with_interval(row, name, words) for name in names)])
    head = [words(k) for k in ("step", "epoch", "val_loss", "train_around", "gap", "eval_seconds")]
    note = words("gap_note")
    if len(shown) < len(validation):
        few = words("evaluations_shown", shown=len(shown), count=len(validation))
        note = f"{few} {note}"
    table = Table([*head, *names], rows, num_text=0, note=note, marked=frozenset(marked))
    return Section(
        "evaluation", words("evaluation"), [Sentences([("note", _best(run, words))]), table]
    )


def _chosen(rows: list[dict[str, float]], best: Any) -> list[dict[str, float]]:
    """Keep at most ``MOST_ROWS`` evaluations, evenly apart; the best and the last one are always among them."""
    apart = 1 if len(rows) <= MOST_ROWS else -(-len(rows) // (MOST_ROWS - 2))
    return [
        row
        for i, row in enumerate(rows)
        if i % apart == 0 or i == len(rows) - 1 or row["step"] == best
    ]


def _measured(run: RunRecord) -> list[str]:
    """Name what was measured of validation beside its loss, what matters most first."""
    names = {n for row in run.metrics for n in row if n.startswith("val/")} - {"val/loss"}
    names = {name for name in names if not name.endswith(("_low", "_high"))}
    return sorted(names, key=lambda name: ("accuracy" not in name, "margin" not in name, name))


def _with_interval(row: dict[str, float], name: str, words: Words) -> str:
    ends = [row[f"{name}{end}"] for end in ("_low", "_high") if f"{name}{end}" in row]
    between = " – ".join(words.number(end) for end in ends)
    return f"{_cell(row, name, words)} ({between})" if between else _cell(row, name, words)


def _best(run: RunRecord, words: Words) -> str:
    step, score = run.record.get("best_step"), run.record.get("best_score")
    if step is None or score is None:
        return words("no_best")
    return words(
        "best_step_of",
        step=step,
        monitor=str(run.record.get("monitor", "val/loss")),
        score=float(score),
    )


def _cell(row: dict[str, float], name: str, words: Words) -> str:
    return words.number(row[name]) if name in row else ""


def _rate(row: dict[str, float], words: Words) -> str:
    return words.rate(row["lr"]) if "lr" in row else ""


def _epoch(row: dict[str, float], words: Words) -> str:
    return words.fixed(row["epoch"], 2) if "epoch" in row else ""
