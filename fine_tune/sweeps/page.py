"""The report of a sweep: what was searched, the ranked trials, what mattered, and pictures of them."""

import base64
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from fine_tune import __version__
from fine_tune.report.blocks import (
    Block,
    Card,
    Charts,
    Code,
    Facts,
    Page,
    Section,
    Sentences,
    Table,
)
from fine_tune.report.words import Language, Words
from fine_tune.report.write import write_page
from fine_tune.sweeps.compare import Difference
from fine_tune.sweeps.driver import RUNS, SECONDS, best_first
from fine_tune.sweeps.ledger import REASON, number_of
from fine_tune.sweeps.space import Sweep, told_of

NAME = "sweep"
FEWEST = 4  # finished trials, below which nothing is said of what mattered
MOST_SLICES = 8


def write_sweep_page(
    study: Study,
    trials: list[FrozenTrial],
    sweep: Sweep,
    folder: Path,
    commands: list[str],
    against: dict[int, Difference],
    language: Language = "en",
) -> Path:
    """Write ``sweep.html`` and ``sweep.md`` into the sweep's folder; return the page's path.

    Args:
        study: The study, finished or not.
        trials: The try that counts of each trial.
        sweep: What is searched.
        folder: The sweep's.
        commands: What to type next.
        against: Trials compared with the config's own setting, by their numbers.
        language: en or id.
    """
    words = Words(language)
    page = _page(study, trials, sweep, folder.name, commands, against, words)
    return write_page(page, words, folder / NAME)


def _page(
    study: Study,
    trials: list[FrozenTrial],
    sweep: Sweep,
    name: str,
    commands: list[str],
    against: dict[int, Difference],
    words: Words,
) -> Page:
    ranked = best_first(trials, sweep.metrics)
    open_ones = [t for t in trials if not t.state.is_finished()]
    status = "running" if open_ones else "finished"
    return Page(
        language=words.language,
        title=name,
        status=words(f"status_{status}"),
        tone="note" if open_ones else "good",
        lead=[
            words(
                "sweep_lead",
                done=len(ranked),
                early=_count(trials, TrialState.PRUNED),
                failed=_count(trials, TrialState.FAIL),
            )
        ],
        cards=_cards(trials, ranked, sweep, words),
        sections=[
            Section("space", words("sweep_space"), [_space(sweep, words)]),
            Section("trials", words("sweep_trials"), _trials(trials, ranked, sweep, words)),
            *_against(ranked, against, words),
            *_mattered(study, sweep, ranked, words),
            *_pictures(study, sweep, ranked, words),
            Section("commands", words("commands"), [Code("", commands)]),
        ],
        footer=words("made", version=__version__, time=time.strftime("%Y-%m-%d %H:%M")),
    )


def _count(trials: list[FrozenTrial], state: TrialState) -> int:
    return sum(trial.state == state for trial in trials)


def _cards(
    trials: list[FrozenTrial], ranked: list[FrozenTrial], sweep: Sweep, words: Words
) -> list[Card]:
    cards = [Card(words("sweep_trials"), words.number(len(trials)))]
    if ranked:
        where = words("sweep_trial", number=number_of(ranked[0]))
        cards += [
            Card(name, words.number(value), where)
            for name, value in zip(sweep.metrics, ranked[0].values, strict=True)
        ]
    seconds = sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials)
    return [*cards, Card(words("card_time"), words.seconds(seconds))]


def _space(sweep: Sweep, words: Words) -> Facts:
    seeds = ", ".join(map(str, sweep.seeds)) or words("sweep_own_seed")
    return Facts(
        [
            *((key, told_of(parameter)) for key, parameter in sweep.parameters.items()),
            *sweep.metrics.items(),
            (words("sweep_sampler"), sweep.sampler),
            (words("sweep_pruner"), sweep.pruner),
            (words("sweep_seeds"), seeds),
        ]
    )


def _trials(
    trials: list[FrozenTrial], ranked: list[FrozenTrial], sweep: Sweep, words: Words
) -> list[Block]:
    rows = []
    for trial in [*ranked, *(t for t in trials if t not in ranked)]:
        values = trial.values or [None] * len(sweep.metrics)
        seconds = trial.user_attrs.get(SECONDS)
        rows.append(
            [
                str(number_of(trial)),
                words(f"sweep_state_{trial.state.name.lower()}"),
                *(_shown(trial.params.get(key), words) for key in sweep.parameters),
                *("" if value is None else words.number(value) for value in values),
                "" if seconds is None else words.seconds(seconds),
            ]
        )
    head = [words("sweep_number"), words("sweep_state"), *sweep.parameters, *sweep.metrics]
    failed: list[Block] = [
        Sentences(
            [
                ("bad", f"{words('sweep_trial', number=number_of(t))}: {t.user_attrs[REASON]}")
                for t in trials
                if t.state == TrialState.FAIL and REASON in t.user_attrs
            ]
        )
    ]
    table = Table([*head, words("card_time")], rows, 2, marked=frozenset([0] if ranked else []))
    runs = [run for t in ranked[:1] for run in t.user_attrs.get(RUNS, [])]
    told: list[Block] = [Code(words("sweep_best_runs"), runs)] if runs else []
    return [table, *told, *(block for block in failed if block.items)]  # type: ignore[union-attr]


def _against(
    ranked: list[FrozenTrial], against: dict[int, Difference], words: Words
) -> list[Section]:
    """How trials compare with the config's own setting, over seeds and rows."""
    rows = [
        [
            str(number_of(trial)),
            words(f"sweep_{found.verdict.replace(' ', '_')}"),
            words.number(found.value),
            words("sweep_interval", low=found.low, high=found.high),
        ]
        for trial in ranked
        if (found := against.get(trial.number)) is not None
    ]
    if not rows:
        return []
    head = [words(f"sweep_{name}") for name in ("number", "verdict", "difference", "ends")]
    note = words("sweep_against_note")
    return [Section("against", words("sweep_against"), [Table(head, rows, 2, note=note)])]


def _mattered(study: Study, sweep: Sweep, ranked: list[FrozenTrial], words: Words) -> list[Section]:
    """How much each setting decides of the first metric: PED-ANOVA (arXiv 2304.10255), which needs no other package."""
    if len(ranked) < FEWEST or len(sweep.parameters) < 2:
        return []
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    target = None if len(sweep.metrics) == 1 else (lambda trial: trial.values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    rows = [[key, words.share(share)] for key, share in found.items()]
    table = Table([words("sweep_setting"), words("sweep_share")], rows, 1, bars=1)
    return [Section("importance", words("sweep_importance"), [table])]


def _pictures(study: Study, sweep: Sweep, ranked: list[FrozenTrial], words: Words) -> list[Section]:
    if len(ranked) < 2:
        return []
    from optuna.visualization import matplotlib as plots

    several = len(sweep.metrics) > 1
    first, keys = next(iter(sweep.metrics)), list(sweep.parameters)[:MOST_SLICES]
    target: Any = (lambda trial: trial.values[0]) if several else None
    given = {"target": target, "target_name": first}
    drawn = [
        (words("sweep_history"), _picture(lambda: plots.plot_optimization_history(study, **given))),
        (words("sweep_slices"), _picture(lambda: plots.plot_slice(study, params=keys, **given))),
    ]
    if len(keys) > 1:
        parallel = lambda: plots.plot_parallel_coordinate(study, params=keys, **given)  # noqa: E731
        drawn.append((words("sweep_parallel"), _picture(parallel)))
    if len(sweep.metrics) in (2, 3):
        names = list(sweep.metrics)
        front = lambda: plots.plot_pareto_front(study, target_names=names)  # noqa: E731
        drawn.append((words("sweep_front"), _picture(front)))
    blocks: list[Block] = [Charts([(title, drawing, "") for title, drawing in drawn])]
    return [Section("pictures", words("sweep_pictures"), blocks)]


def _picture(draw: Callable[[], Any]) -> str:
    """Return a picture of Optuna's as an image in the page: text in it is pixels, whatever it says."""
    matplotlib.use("Agg")
    try:
        image = _drawn(draw, formulas=True)
    except ValueError:  # a value with dollar signs is no formula
        image = _drawn(draw, formulas=False)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(image).decode()}">'


def _drawn(draw: Callable[[], Any], *, formulas: bool) -> bytes:
    import matplotlib.pyplot as plt

    with (
        warnings.catch_warnings(),
        plt.style.context("default"),
        matplotlib.rc_context({"text.parse_math": formulas}),
    ):
        warnings.simplefilter("ignore")
        axes = draw()
        figure = axes.flat[0].figure if hasattr(axes, "flat") else axes.figure
        if not hasattr(axes, "flat"):
            axes.set_title("")  # the page has its own
        written = io.BytesIO()
        try:
            figure.savefig(written, format="png", dpi=110, bbox_inches="tight")
        finally:
            plt.close(figure)
    return written.getvalue()


def _shown(value: Any, words: Words) -> str:
    if isinstance(value, float):
        return words.localized(f"{value:.4g}")
    return "" if value is None else str(value)
