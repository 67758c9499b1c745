"""``plan``: whether a run fits, what it takes and what would fit, before anything is loaded or paid."""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from fine_tune.callbacks.progress import format_seconds
from fine_tune.device_memory import HEADROOM
from fine_tune.errors import UserError
from fine_tune.exits import exit_code
from fine_tune.modules.memory_plan import CUDA_CONTEXT, MemoryPlanner, StepMemory
from fine_tune.modules.memory_ways import Fitting, Way, largest_budget, largest_rows, ways_to_train
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit
from fine_tune.runs.find import find_run
from fine_tune.settings import read_yaml, split_flags

GIB = 2**30
ON_A_GPU = "bf16-mixed"  # has the sizes of 16-mixed, too
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "attention")
HELP = "The other flags are those of fit: --config configs/x.yaml, --data.path rows.jsonl ... (fit --help)."


def main(args: list[str]) -> int:
    """Print the plan; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tune plan", description=__doc__, epilog=HELP, allow_abbrev=False
    )
    parser.add_argument(
        "--gpu_memory_gib",
        type=float,
        help="Memory of the GPU to plan for; prints the settings that fit, best first.",
    )
    parser.add_argument(
        "--tokens_per_second",
        type=float,
        help="Speed of an earlier run, for the time it will take.",
    )
    parser.add_argument("--like", help="A run whose speed is taken instead: its folder or name.")
    own, settings = parser.parse_known_args(args[1:])
    return exit_code(lambda: plan(settings, own.gpu_memory_gib, own.tokens_per_second, own.like))


def plan(
    settings: list[str],
    gpu_memory_gib: float | None = None,
    tokens_per_second: float | None = None,
    like: str | None = None,
) -> None:
    """Say what ``fit`` with these settings will take.

    Args:
        settings: Flags of ``fit``.
        gpu_memory_gib: Of a GPU; None where nobody asks what fits.
        tokens_per_second: Of training tokens.
        like: A run whose speed is taken.

    Raises:
        UserError: What ``fit`` would refuse, a memory or speed that is none, or a run that measured no speed.
    """
    for name, value in (
        ("gpu_memory_gib", gpu_memory_gib),
        ("tokens_per_second", tokens_per_second),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: must be above 0 and finite, got {value}")
    on_a_gpu = gpu_memory_gib is not None and not _given(settings, "trainer.precision")
    run = prepare_as_fit([*settings, *(["--trainer.precision", ON_A_GPU] if on_a_gpu else [])])
    if like is not None:
        tokens_per_second = speed_of(find_run(like, run.root).path)
    run.datamodule.setup("fit")
    batch = run.datamodule.longest_rows("train")
    precision = str(run.settings.trainer.precision)
    memory = None if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, precision, memory)
    ways = ways_to_train(run.model.model_settings, planner.config)
    rows = largest_rows(batch["lengths"], run.plan.max_tokens_per_micro_batch)
    found = [(way, planner.at_once(way.settings, batch, rows)) for way in ways]
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for part in (
        _of_data(run),
        _of_memory(found, batch["lengths"], rows, precision, asked=not on_a_gpu),
        _of_disk(run, found[0][1]),
        _of_time(run, tokens_per_second),
    ):
        for line in part:
            console.print(line)
        console.print()
    if gpu_memory_gib is not None:
        room = (1 - HEADROOM) * gpu_memory_gib * GIB - CUDA_CONTEXT
        fitting = [largest_budget(planner, way, batch, room) for way in ways]
        for line in _what_fits([f for f in fitting if f is not None], gpu_memory_gib, batch):
            console.print(line)


def speed_of(folder: Path) -> float:
    """Return the median of the tokens per second that a run measured.

    Raises:
        UserError: It measured none.
    """
    from fine_tune.report.record import read_run

    rates = read_run(folder).curve("perf/tokens_per_second").finite().values
    if not len(rates):
        raise UserError(f"like: {folder} has no perf/tokens_per_second in its metrics.csv")
    return float(statistics.median(rates))


def _given(settings: list[str], key: str) -> bool:
    flags, files = split_flags(settings)
    given = [*flags, *(setting for file in files for setting in read_yaml(file)[0])]
    return any(setting.key == key for setting in given)


def _of_data(run: PreparedCLI) -> Iterator[str]:
    plan = run.plan
    tokens, supervised = plan.num_tokens["train"], plan.num_supervised["train"]
    epochs = plan.num_steps / plan.steps_per_epoch
    yield (
        f"data    {plan.num_rows['train']:,} training rows, {tokens:,} tokens, {supervised:,} of them supervised; "
        f"longest row {plan.longest_row['train']:,}"
    )
    yield (
        f"steps   {plan.num_steps:,} ({plan.steps_per_epoch:,} per epoch) of {plan.batch_size} rows: "
        f"{round(epochs * tokens):,} tokens in all"
    )


def _of_memory(
    found: list[tuple[Way, StepMemory]],
    lengths: list[int],
    rows: int,
    precision: str,
    *,
    asked: bool,
) -> Iterator[str]:
    assumed = "" if asked else ", assumed for a GPU"
    yield f"memory  GiB, {rows} rows of {lengths[0]:,} tokens at a time, {precision}{assumed}"
    headings = "".join(f"{term:>12}" for term in (*TERMS, "together"))
    yield f"  {'trained':<13}recomputed{headings}"
    for way, memory in found:
        sizes = [*(getattr(memory, term) for term in TERMS), memory.total]
        recomputed = "yes" if way.settings.gradient_checkpointing else "no"
        shown = "".join(f"{size / GIB:>12.2f}" for size in sizes)
        yield f"  {way.name:<13}{recomputed:<10}{shown}"
    yield f"  on a GPU its driver takes about {CUDA_CONTEXT / GIB:.1f} GiB more"


def _of_disk(run: PreparedCLI, memory: StepMemory) -> Iterator[str]:
    # gradients have the sizes of what is trained, and a checkpoint holds no more than that and the optimizer's state
    kept, size = run.settings.checkpoint.keep + 1, memory.gradients + memory.optimizer
    yield f"disk    a checkpoint has {size / 1e9:.2f} GB; up to {kept} are kept: {kept * size / 1e9:.2f} GB"


def _of_time(run: PreparedCLI, tokens_per_second: float | None) -> Iterator[str]:
    if tokens_per_second is None:
        yield "time    not known: give --tokens_per_second, or --like RUN of an earlier run"
        return
    plan = run.plan
    tokens = plan.num_tokens["train"] * plan.num_steps / plan.steps_per_epoch
    seconds = format_seconds(tokens / tokens_per_second)
    yield f"time    {seconds} of training at {tokens_per_second:,.0f} tokens/s"


def _what_fits(fitting: list[Fitting], gpu_memory_gib: float, batch: Any) -> Iterator[str]:
    percent = round(100 * (1 - HEADROOM))
    yield f"fits in {gpu_memory_gib:g} GiB with {percent} % of it used, best first"
    for found in fitting:
        used = (found.memory.total + CUDA_CONTEXT) / GIB
        yield f"  {used:6.2f} GiB  {found.rows} rows at once   {found.flags}"
    if not fitting:
        longest = f"{batch['lengths'][0]:,} tokens"
        yield f"  nothing: one row of {longest} is too much; give --data.max_length, or a smaller model"
