"""What the user reads at the start (what will run) and at the end (what came out, where it is, what to type next)."""

import shlex
from pathlib import Path
from typing import Any

from fine_tune.batches import Choice, DataPlan
from fine_tune.callbacks.generations import GENERATIONS_FILE, before_after_table, read_generations
from fine_tune.callbacks.progress import format_seconds
from fine_tune.report.targets import judge
from fine_tune.runs.results import own_results, timed_steps
from fine_tune.runs.run_folder import RunFolder


def start(verb: str, model: Any, plan: DataPlan, trainer: Any, folder: Path) -> list[str]:
    """Lines that say what will run."""
    rows = "  ".join(
        f"{split} {count:,} rows ({plan.num_tokens[split]:,} tokens, {plan.num_supervised[split]:,} supervised)"
        for split, count in plan.num_rows.items()
    )
    settings = model.model_settings
    source = (
        settings.model_name_or_path
        or f"new {(settings.from_config or {}).get('model_type', 'model')}, random weights"
    )
    how = "all weights"
    if settings.lora:
        targets = settings.lora.target_modules or "peft's default layers"
        names = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        how = f"LoRA r={settings.lora.r} alpha={settings.lora.lora_alpha} on {names}"
        how = f"{settings.quantized} + {how}" if settings.quantized else how
    lines = [
        f"{verb}: {source}, {how}, {trainer.precision} on {trainer.num_devices} x {trainer.strategy.root_device.type}",
        f"data: {rows}",
    ]
    lines += [f"  {note}" for note in plan.notes]
    if verb == "fit":
        warmup = model.num_warmup_steps(plan)
        lines.append(
            f"steps: {plan.num_steps:,} ({plan.steps_per_epoch:,} per epoch) of {plan.batch_size} rows, "
            f"longest row {plan.longest_row['train']:,} tokens, {model.lr_scheduler} after {warmup} warm-up steps"
        )
        if warmup > plan.num_steps:
            lines.append(f"  trainer.max_steps ends the run inside its warm-up of {warmup} steps")
    return [*lines, f"run folder: {folder}"]


def choices(chosen: dict[str, Choice]) -> list[str]:
    """Lines that give the settings chosen by rule, each with its reason."""
    return [f"{key}: {choice.value} ({choice.reason})" for key, choice in chosen.items()]


def end_of_fit(run: RunFolder, seconds: float, targets: dict[str, float]) -> list[str]:
    """Lines that say what came out, where it is, and the next command."""
    record = run.read()
    lines = ["", *_answers(run)]
    step, num_steps = record.get("step", 0), record.get("num_steps", 0)
    lines.append(
        f"{record.get('status', 'ended')}: step {step:,} of {num_steps:,} in {format_seconds(seconds)}"
    )
    if record.get("seconds") and record.get("num_tokens"):
        of_step = record["num_tokens"]["train"] / record["steps_per_epoch"]
        timed = sum(last - first for first, last in timed_steps(record))
        lines[-1] += f", {of_step * step:,.0f} tokens"
        lines[-1] += f", {of_step * timed / record['seconds']:,.0f} tokens/s" if timed else ""
    if record.get("status") == "finished" and step < num_steps:
        lines.append("early stopping ended it: the metric it watches no longer improved")
    for result in record.get("results", [])[-2:]:
        shown = "  ".join(
            f"{name} {value:.4g}"
            for name, value in result["metrics"].items()
            if _is_of(name, result)
        )
        lines.append(f"{result['split']} of {result['checkpoint']}: {shown}")
    lines += reached(run, targets)
    lines += [
        f"best: step {record.get('best_step')}  {run.checkpoints / str(record.get('best'))}",
        f"metrics: {run.path / 'metrics.csv'}   log: {run.path / 'train.log'}",
        f"curves: tensorboard --logdir {shlex.quote(str(run.path))}",
    ]
    if record.get("status") == "finished":
        lines += _uses(run, record)
    else:
        lines.append(resume(run))
    return lines


def _uses(run: RunFolder, record: dict[str, Any]) -> list[str]:
    """Lines that measure and use what was trained, ready to paste."""
    identity, folder = record.get("identity", {}), shlex.quote(str(run.path))
    has_adapter = any(key.startswith("model.lora.") for key in identity)
    of_best = f"--config {_config(run)} --ckpt_path best"
    tested = any(result["split"] == "test" for result in own_results(record))
    verbs = [f"test {of_best}"] if "test" in record.get("num_rows", {}) and not tested else []
    verbs += [] if str(identity.get("model", "")).endswith("Reward") else [f"chat {folder}"]
    verbs += [f"predict {of_best} --data.predict_path IN.jsonl --output OUT.jsonl"]
    verbs += [f"{'merge' if has_adapter else 'export'} {folder}"]
    return [
        f"{'     ' if i else 'next:'} python -m fine_tune {verb}" for i, verb in enumerate(verbs)
    ]


def stopped(run: RunFolder, verb: str, signal: str, *, opened: bool = False) -> list[str]:
    """Lines that say what a signal left, and the command that goes on from there.

    Args:
        run: The run.
        verb: What was going on.
        signal: Its name.
        opened: Whether the test split had been opened.
    """
    record, last = run.read(), run.checkpoint("last")
    if verb != "fit":
        counted = "; its opening of the test split counts" if opened else ""
        return [f"stopped by {signal}: no result of this {verb} was kept{counted}"]
    if last is None:
        return [f"stopped by {signal} before anything was saved", resume(run)]
    where = f"step {record.get('step', 0):,} of {record.get('num_steps', 0):,}"
    if record.get("status") == "finished":
        line = f"stopped by {signal} after the last step, {where}; all of it is saved: {last}"
        return [
            line,
            f"next: python -m fine_tune validate --config {_config(run)} --ckpt_path best",
        ]
    return [f"stopped by {signal} at {where}; saved: {last}", resume(run)]


def resume(run: RunFolder) -> str:
    """Say the command that goes on with a run; without a checkpoint, the one that starts it again."""
    command = f"python -m fine_tune fit --config {_config(run)}"
    if run.checkpoint("last") is None:
        return f"start again: {command}"
    return f"resume: {command} --ckpt_path last"


def reached(run: RunFolder, targets: dict[str, float]) -> list[str]:
    """Lines that say which targets were reached."""
    lines = []
    for target in judge(own_results(run.read()), targets):
        told = "not measured, the run stopped before it"
        if target.measured is not None:
            verdict = "reached" if target.is_reached else "missed"
            told = f"{verdict} with {target.measured:.4g}"
        lines.append(f"target {target.name} {target.goal:g}: {told}")
    return lines


def evaluation(run: RunFolder, count: int = 1) -> list[str]:
    """Lines that give the newest results of validate or test."""
    lines = []
    for result in run.read()["results"][-count:]:
        lines.append(f"{result['split']} of {result['checkpoint'] or 'the model as configured'}:")
        lines += [
            f"  {name} {value:.6g}"
            for name, value in sorted(result["metrics"].items())
            if _is_of(name, result)
        ]
    return [*lines, f"kept in {run.path / 'run.json'}"]


def _config(run: RunFolder) -> str:
    """The run's settings as one word of a command line, which is no flag."""
    config = str(run.path / "config.yaml")
    return shlex.quote(f"./{config}" if config.startswith("-") else config)


def _is_of(name: str, result: dict[str, Any]) -> bool:
    return name.startswith({"validation": "val/", "test": "test/"}[result["split"]])


def _answers(run: RunFolder) -> list[str]:
    answers = read_generations(run.path / GENERATIONS_FILE)
    after = [a["stage"] for a in answers if a["stage"].startswith("after ")]
    return [*before_after_table(answers, after[-1]), ""] if after else []
