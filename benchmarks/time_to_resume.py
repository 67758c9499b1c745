"""Seconds from the command to the end of the first resumed step, imports apart: ours beside transformers.Trainer.

The model of ``checkpoint_stall.py`` (about 50M random weights), a checkpoint at step 100, the same rows, alternating,
each in a process of its own that has imported everything. Then ours again from the same state counted as step 100,000:
the position in the data is a computation, so the time must not grow.

    python benchmarks/time_to_resume.py [--pairs 5]
"""

import argparse
import contextlib
import importlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from checkpoint_stall import MODEL, save_small_model
from lightning.pytorch import Callback
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fine_tune.__main__ import main as fine_tune
from fine_tune.runs.checkpoint import TRAINING_STATE, read_manifest, read_state, write_checkpoint

NEAR, FAR = 100, 100_000
ROWS = 1000


class Reached(Exception):
    """The step that was waited for has been taken, just now: what a failed run does at its end is not counted."""

    def __init__(self) -> None:
        self.at = time.perf_counter()


class EndAfter(Callback):
    """End a run of ours at once after a step.

    Args:
        step: The step; 0 for the first one of this start.
    """

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.step:
            raise Reached


class PeerEndAfter(TrainerCallback):
    """The same for transformers.Trainer."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise Reached


def seconds_until_reached(run: Any) -> float:
    """Return the seconds until ``run`` says that its step has been taken."""
    start = time.perf_counter()
    try:
        run()
    except Reached as reached:
        return reached.at - start
    raise AssertionError("the run ended before its step")


def our_command(root: Path, *more: str) -> list[str]:
    """Return the command line of a run of 101,000 steps."""
    return [
        *("fit", "--model", "fine_tune.modules.SFT", "--trainer.default_root_dir", str(root)),
        *("--model.model_name_or_path", str(root / "model"), "--model.optimizer.lr", "1e-4"),
        *("--data", "fine_tune.data.SFTData", "--data.path", str(root / "rows.jsonl")),
        *("--data.prompt", "{q}", "--data.completion", "{a}", "--data.split", "none"),
        *("--data.batch_size", "1", "--data.epochs", str(FAR // ROWS + 1)),
        *("--checkpoint.every", str(NEAR), "--generations.rows", "0"),
        *("--trainer.enable_progress_bar", "false", *more),
        *("--trainer.callbacks+=time_to_resume.EndAfter", "--trainer.callbacks.step"),
    ]


def advanced(folder: Path, root: Path) -> Path:
    """Write the checkpoint of step 100 again as one of step 100,000 of another run: only its counters differ."""
    state = read_state(folder)

    def counted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: counted(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [counted(inner) for inner in value]
        return FAR if type(value) is int and value == NEAR else value

    far = {k: v if k == "optimizer_states" else counted(v) for k, v in state.items()}
    assert far["global_step"] == FAR

    def copy_rest(target: Path, _: dict[str, torch.Tensor]) -> None:
        for file in folder.iterdir():
            if file.name not in (TRAINING_STATE, "manifest.json"):
                shutil.copy(file, target / file.name)

    facts = {
        k: v
        for k, v in read_manifest(folder).items()
        if not k.startswith(("sha", "xxh", "manifest"))
    }
    run = root / "lightning_logs" / "far" / "version_0"
    target = run / "checkpoints" / folder.name.replace(f"step={NEAR}", f"step={FAR}")
    target.parent.mkdir(parents=True)
    shutil.copy(folder.parents[1] / "run.json", run)
    facts = {**facts, "global_step": FAR}
    write_checkpoint(target, far, export=copy_rest, facts=facts, needed=0)
    return target


class Peer:
    """transformers.Trainer on the same model and rows, with a checkpoint at step 100."""

    def __init__(self, root: Path) -> None:
        self.model_folder, self.folder = root / "model", root / "peer"
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        lines = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
        ids = [tokenizer(row["q"] + row["a"])["input_ids"] for row in lines]
        self.rows = [{"input_ids": row, "labels": row} for row in ids]

    def train(self, max_steps: int, *callbacks: TrainerCallback, resume: bool) -> None:
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=max_steps,
            per_device_train_batch_size=1,
            save_steps=NEAR,
            optim="adamw_torch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = LlamaForCausalLM.from_pretrained(self.model_folder)
        trainer = Trainer(model, arguments, train_dataset=self.rows, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)


def leg(name: str, root: Path) -> float:
    """Resume once, in this process, and return the seconds; what the first such process imports, later ones have."""
    imports = root / f"{name}.imports"
    for module in imports.read_text().split() if imports.exists() else []:
        with contextlib.suppress(ImportError):  # made at run time, not by an import
            importlib.import_module(module)
    before = set(sys.modules)
    seconds = _resume(name, root)
    if not imports.exists():
        imports.write_text("\n".join(sorted(set(sys.modules) - before)))
    return seconds


def _resume(name: str, root: Path) -> float:
    if name == "peer":
        peer = Peer(root)
        return seconds_until_reached(lambda: peer.train(FAR + NEAR, PeerEndAfter(), resume=True))
    run = root / "lightning_logs" / {"ours": "run", "far": "far"}[name] / "version_0"
    line = [*our_command(root, "--ckpt_path", str(next(run.glob("checkpoints/epoch*")))), "0"]
    return seconds_until_reached(lambda: fine_tune(line))


def measured(name: str, root: Path) -> float:
    """Resume once, in a process of its own."""
    command = [sys.executable, __file__, "--leg", name, "--root", str(root)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ended.stdout.strip().splitlines()[-1])


def compare(pairs: int, root: Path) -> None:
    """Save both checkpoints, then resume from them in turn."""
    save_small_model(root / "model", max_position_embeddings=128, **MODEL)
    rows = [json.dumps({"q": f"{i} + {i}?", "a": str(2 * i)}) + "\n" for i in range(ROWS)]
    (root / "rows.jsonl").write_text("".join(rows))
    seconds_until_reached(lambda: fine_tune([*our_command(root), str(NEAR + 1)]))
    run = root / "lightning_logs" / "run" / "version_0"
    advanced(next((run / "checkpoints").glob(f"*step={NEAR}")), root)
    Peer(root).train(NEAR, resume=False)
    seconds: dict[str, list[float]] = {"peer": [], "ours": [], "far": []}
    for name in seconds:
        measured(name, root)  # notes what is imported on the way
    for pair in range(pairs):
        for name in ("peer", "ours", "far")[:: 1 if pair % 2 == 0 else -1]:
            seconds[name].append(measured(name, root))
        print(
            f"pair {pair}: ours {seconds['ours'][-1]:.2f} s, transformers.Trainer {seconds['peer'][-1]:.2f} s, "
            f"ours at step {FAR:,} {seconds['far'][-1]:.2f} s"
        )
    _print_ratio("ours / transformers.Trainer (must: at most 1)", seconds["ours"], seconds["peer"])
    far = f"ours at step {FAR:,} / at step {NEAR} (must: within 20 %)"
    _print_ratio(far, seconds["far"], seconds["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--leg", choices=["ours", "peer", "far"], help="one measurement")
    parser.add_argument("--root", type=Path, help="of that measurement")
    asked = parser.parse_args()
    if asked.leg is not None:
        print(leg(asked.leg, asked.root))
        return
    packages = ("torch", "lightning", "transformers", "accelerate", "safetensors")
    print(platform.platform(), *(f"{name} {metadata.version(name)}" for name in packages))
    root = Path(tempfile.mkdtemp(prefix="time_to_resume_"))
    try:
        compare(asked.pairs, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _print_ratio(of: str, first: list[float], second: list[float]) -> None:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    print(
        f"seconds to the first resumed step, {of}: median {statistics.median(ratios):.2f} "
        f"(min {min(ratios):.2f}, max {max(ratios):.2f}, {len(ratios)} pairs)"
    )


if __name__ == "__main__":
    import time_to_resume  # the name by which the command line finds EndAfter

    sys.exit(time_to_resume.main())
