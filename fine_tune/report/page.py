"""The report of one run, put together from its parts."""

import time

from fine_tune import __version__
from fine_tune.report import curves, findings, results, tables
from fine_tune.report.blocks import Card, Page
from fine_tune.report.cost import commands, cost
from fine_tune.report.data_card import data_card
from fine_tune.report.observations import Tone
from fine_tune.report.record import RunRecord
from fine_tune.report.results import interval_of, shown_interval
from fine_tune.report.setup import purpose, setup
from fine_tune.report.words import Words
from fine_tune.runs.listing import HEADLINES

TONES: dict[str, Tone] = {"finished": "good", "running": "note", "stopped": "note", "empty": "note"}


def page_of(
    run: RunRecord, words: Words, every: int | None = None, grid: float | None = None
) -> Page:
    """Put the report of a run together.

    Args:
        run: What its folder says.
        words: The language.
        every: Steps between two rows of the table; None: as many as keep it short.
        grid: Grams of CO2e per kWh, where given.
    """
    found = findings.analysis_of(run)
    grid = grid if grid is not None else run.number("grid_gco2e_per_kwh")
    sections = [
        findings.conclusion(run, found, words),
        findings.analysis(run, found, words),
        curves.curves(run, words),
        tables.evaluations(run, words),
        results.test(run, words),
        results.targets(run, words),
        results.answers(run, words),
        tables.steps(run, words, every),
        setup(run, words),
        data_card(run, words),
        cost(run, words, grid),
        commands(run, words),
    ]
    return Page(
        language=words.language,
        title=run.name,
        status=words.known(f"status_{run.status}", run.status),
        tone=TONES.get(run.status, "bad"),
        lead=[purpose(run, words), _became(run, words)],
        cards=_cards(run, words),
        sections=sections,
        footer=words("made", version=__version__, time=time.strftime("%Y-%m-%d %H:%M")),
        warnings=warnings_of(run, words),
    )


def warnings_of(run: RunRecord, words: Words) -> list[str]:
    """Say which of a run's files are missing or damaged."""
    told = []
    if run.missing and run.status != "empty":
        told.append(words("missing_files", names=", ".join(run.missing)))
    if run.damaged:
        told.append(words("damaged_files", names=", ".join(run.damaged)))
    return told


def _became(run: RunRecord, words: Words) -> str:
    if f"became_{run.status}" not in words.texts:
        return ""
    ended_early = run.status == "finished" and run.num_steps and run.step < run.num_steps
    planned = words.number(run.num_steps) if run.num_steps else words("unknown")
    became = "became_stopped_early" if ended_early else f"became_{run.status}"
    return words(became, step=run.step, num_steps=planned)


def _cards(run: RunRecord, words: Words) -> list[Card]:
    planned = f" / {words.number(run.num_steps)}" if run.num_steps else ""
    cards = [Card(words("step"), words.number(run.step) + planned)]
    best, step = run.record.get("best_score"), run.record.get("best_step")
    if best is not None and step is not None:
        monitor = words("best_of", monitor=str(run.record.get("monitor", "val/loss")))
        cards.append(Card(monitor, words.number(float(best)), words("at_step", step=step)))
    train = run.curve("train/loss").finite()
    if len(train):
        where = words("at_step", step=int(train.steps[-1]))
        cards.append(Card(words("train_loss"), words.number(float(train.values[-1])), where))
    tested = run.own_results("test")[-1:]
    for result, name in [(r, n) for r in tested for n in HEADLINES if n in r["metrics"]][:2]:
        ends, _ = interval_of(run, result, name)
        note = f"{words('interval_95')}: {shown_interval(ends, words)}" if ends else ""
        cards.append(Card(name, words.number(float(result["metrics"][name])), note))
    if run.record.get("seconds"):
        cards.append(Card(words("card_time"), words.seconds(run.record["seconds"])))
    return cards
