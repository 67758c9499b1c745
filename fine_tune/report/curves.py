"""How training went, drawn: loss, learning rate, gradient norm, speed, memory, rewards; events marked."""

from dataclasses import replace

from fine_tune.report.blocks import Block, Charts, Section, Sentences
from fine_tune.report.charts import SERIES, Drawing, Line, Mark, draw, smoothed
from fine_tune.report.noise import window
from fine_tune.report.record import Curve, RunRecord
from fine_tune.report.words import Words

EVENTS = {  # kinds of events in run.json, with their colour and stroke
    "out_of_memory": ("bad", "-"),
    "nearly_full": ("warn", "-."),
    "fallback": ("warn", "--"),
    "resume": ("good", ":"),
    "loss_spike": ("three", ":"),
    "event": ("warn", "-."),
}
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
    drawn += _experts(run, words, marks)
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


def _experts(run: RunRecord, words: Words, marks: list[Mark]) -> list[tuple[str, str, str]]:
    drawn = []
    for key in ("load", "entropy"):
        prefix = f"train_experts/{key}_"
        names = sorted({name for row in run.metrics for name in row if name.startswith(prefix)})
        layers = {
            words("layer", number=int(name.removeprefix(prefix))): run.curve(name).finite()
            for name in names
        }
        if layers:
            lines = _of_layers({name: curve for name, curve in layers.items() if len(curve)})
            drawn.append(_drawn(words, f"experts_{key}", Drawing(lines, words("step"), marks)))
    return drawn


def _of_layers(layers: dict[str, Curve]) -> list[Line]:
    """Draw every layer; of more layers than colours, those that end highest and lowest, the others behind them."""
    if len(layers) <= len(SERIES):
        return [
            Line(name, curve, colour=colour)
            for (name, curve), colour in zip(layers.items(), SERIES, strict=False)
        ]
    ranked = sorted(layers, key=lambda name: layers[name].values[-1])
    named = {ranked[-1]: "two", ranked[0]: "three"}
    behind = [Line("", layers[name], faint=True) for name in layers if name not in named]
    return behind + [Line(name, layers[name], colour=colour) for name, colour in named.items()]


def _drawn(words: Words, key: str, drawing: Drawing) -> tuple[str, str, str]:
    svg = draw(replace(drawing, localized=words.localized))
    return words(f"chart_{key}"), svg, in_words(drawing.lines, words)


def in_words(lines: list[Line], words: Words) -> str:
    """Say of each curve that has a name where it begins and ends, and its extremes."""
    told = []
    for line in lines:
        curve = line.curve.finite()
        if len(curve) and line.name:
            numbers = {"first": curve.values[0], "last": curve.values[-1]}
            numbers |= {"low": curve.values.min(), "high": curve.values.max()}
            shown = {name: words.number(float(value)) for name, value in numbers.items()}
            told.append(words("curve_told", name=line.name, **shown))
    return " ".join(told)


def _same(one: Curve, other: Curve) -> bool:
    return len(one) == len(other) and bool((one.values == other.values).all())
