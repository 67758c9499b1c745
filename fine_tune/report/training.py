"""How training went: curves, the table of steps, the table of evaluations."""

from fine_tune.report.analysis import mean_until, window
from fine_tune.report.blocks import Block, Charts, Section, Sentences, Table
from fine_tune.report.charts import Drawing, Line, Mark, draw, smoothed
from fine_tune.report.record import Curve, RunRecord
from fine_tune.report.words import Words

MOST_ROWS = 100
NICE = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10000)
EVENTS = {  # kinds of events in run.json, with their colour and stroke
    "out_of_memory": ("bad", "-"),
    "nearly_full": ("warn", "-."),
    "fallback": ("warn", "--"),
    "resume": ("good", ":"),
    "loss_spike": ("three", ":"),
    "event": ("warn", "-."),
}
FALLING = ("loss", "perplexity")
WIDE_RANGE = 50.0


def events(run: RunRecord) -> dict[str, list[int]]:
    """Return the steps of each kind of event: guards that acted, spikes, and starts after the first."""
    found: dict[str, list[int]] = {}
    for event in run.record.get("events", []):
        kind = str(event.get("kind", "event"))
        if isinstance(event.get("step"), int):
            found.setdefault(kind if kind in EVENTS else "event", []).append(event["step"])
    resumed = [
        s["from_step"]
        for s in run.record.get("starts", [])[1:]
        if isinstance(s.get("from_step"), int)
    ]
    if resumed:
        found["resume"] = resumed
    return {kind: sorted(set(found[kind])) for kind in EVENTS if kind in found}


def curves(run: RunRecord, words: Words) -> Section:
    """Draw loss, learning rate, gradient norm, speed and memory, events marked."""
    train = run.curve("train/loss")
    if not run.metrics:
        return Section("curves", words("curves"), [Sentences([("note", words("no_metrics"))])])
    marks = [
        Mark(words(f"event_{kind}"), steps, *EVENTS[kind]) for kind, steps in events(run).items()
    ]
    raw = Line(words("train_raw"), train, faint=len(train) > 20)
    lines = [raw]
    if raw.faint:
        lines.append(Line(words("train_smooth"), smoothed(train, window(train))))
    validation = run.curve("val/loss")
    if len(validation):
        lines.append(Line(words("validation"), validation, points=True, colour="two"))
    values = train.finite().values
    wide = len(values) > 1 and values.min() > 0 and values.max() > WIDE_RANGE * values.min()
    drawn = [_drawn(words, "loss", Drawing(lines, words("step"), marks, logarithmic=bool(wide)))]
    drawn += _single(run, words, "lr", "lr", marks)
    drawn += _single(run, words, "grad_norm", "grad_norm", marks)
    drawn += _single(run, words, "perf/tokens_per_second", "rate", marks)
    drawn += _memory(run, words, marks)
    drawn += _rewards(run, words, marks)
    blocks: list[Block] = [Charts(drawn)]
    told = [("note", line) for line in event_lines(run, words)]
    if told:
        blocks.append(Sentences(told))  # type: ignore[arg-type]
    return Section("curves", words("curves"), blocks)


def event_lines(run: RunRecord, words: Words) -> list[str]:
    """Say which events there were, with their steps."""
    lines = []
    for kind, steps in events(run).items():
        shown = ", ".join(words.number(step) for step in steps[:12])
        more = f" … (+{len(steps) - 12})" if len(steps) > 12 else ""
        lines.append(f"{words(f'event_{kind}')}: {words('at_steps')} {shown}{more}")
    return lines


def steps(run: RunRecord, words: Words, every: int | None) -> Section:
    """List every N-th step: loss, learning rate, gradient norm, epoch."""
    rows = [row for row in run.metrics if "train/loss" in row]
    if not rows:
        return Section("steps", words("steps"), [Sentences([("note", words("no_metrics"))])])
    logged = int(run.setting("trainer.log_every_n_steps") or 1)
    every = every or interval(len(rows), logged)
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
    note = words("every_n", every=every, logged=len(rows))
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
    for row in (row for row in run.metrics if "val/loss" in row):
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
    table = Table(
        [*head, *names], rows, num_text=0, note=words("gap_note"), marked=frozenset(marked)
    )
    return Section(
        "evaluation", words("evaluation"), [Sentences([("note", _best(run, words))]), table]
    )


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


def _single(
    run: RunRecord, words: Words, column: str, key: str, marks: list[Mark]
) -> list[tuple[str, str, str]]:
    curve = run.curve(column)
    if not len(curve.finite()):
        return []
    values = curve.finite().values
    wide = column == "grad_norm" and values.min() > 0 and values.max() > WIDE_RANGE * values.min()
    lines = [Line(words(key), curve)]
    drawing = Drawing(lines, words("step"), marks, logarithmic=bool(wide), legend=False)
    return [_drawn(words, key, drawing)]


def _memory(run: RunRecord, words: Words, marks: list[Mark]) -> list[tuple[str, str, str]]:
    names = ("perf/vram_peak_gib", "perf/memory_allocated_gib", "perf/memory_reserved_gib")
    found = [(name, run.curve(name)) for name in names]
    known = [(name, curve) for name, curve in found if len(curve.finite())]
    if len(known) == 2 and _same(known[0][1], known[1][1]):
        known = known[:1]  # of a CPU: one number, twice
    lines = [
        Line(words(name.split("/")[1]), curve, colour=colour)
        for (name, curve), colour in zip(known, ("one", "two", "three"), strict=False)
    ]
    return (
        [_drawn(words, "memory", Drawing(lines, words("step"), marks, legend=len(lines) > 1))]
        if lines
        else []
    )


def _rewards(run: RunRecord, words: Words, marks: list[Mark]) -> list[tuple[str, str, str]]:
    drawn = []
    for name in ("rewards_accuracy", "rewards_margin"):
        train, validation = run.curve(f"train/{name}"), run.curve(f"val/{name}")
        lines = [Line(words("train_raw"), train)] if len(train) else []
        if len(validation):
            lines.append(Line(words("validation"), validation, points=True, colour="two"))
        if lines:
            drawn.append(_drawn(words, name, Drawing(lines, words("step"), marks)))
    return drawn


def _drawn(words: Words, key: str, drawing: Drawing) -> tuple[str, str, str]:
    told = []
    for line in drawing.lines:
        curve = line.curve.finite()
        if len(curve):
            numbers = {"first": curve.values[0], "last": curve.values[-1]}
            numbers |= {"low": curve.values.min(), "high": curve.values.max()}
            shown = {name: words.number(float(value)) for name, value in numbers.items()}
            told.append(words("curve_told", name=line.name, **shown))
    return words(f"chart_{key}"), draw(drawing), " ".join(told)


def _same(one: Curve, other: Curve) -> bool:
    return len(one) == len(other) and bool((one.values == other.values).all())


def _cell(row: dict[str, float], name: str, words: Words) -> str:
    return words.number(row[name]) if name in row else ""


def _rate(row: dict[str, float], words: Words) -> str:
    return words.rate(row["lr"]) if "lr" in row else ""


def _epoch(row: dict[str, float], words: Words) -> str:
    return words.fixed(row["epoch"], 2) if "epoch" in row else ""
