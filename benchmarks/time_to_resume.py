"""C6, resuming: seconds from the command to the end of the first resumed step, ours beside transformers.Trainer.

The model of ``checkpoint_stall.py`` (about 50M random weights), a checkpoint at step 100, the same rows, alternating,
each in a process of its own that has imported everything. Then ours again from the same state counted as step 100,000:
the position in the data is a computation, so the time must not grow.
"""

import functools
import gc
import json
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.checkpoint_stall import MODEL
from benchmarks.harness import Bench, Measured, by_turns
from benchmarks.inputs import save_model
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
        *("--trainer.callbacks+=benchmarks.time_to_resume.EndAfter", "--trainer.callbacks.step"),
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


def resume_peer(root: str) -> Measured:
    """Resume once, in this process, and return the seconds."""
    peer = Peer(Path(root))
    run = functools.partial(peer.train, FAR + NEAR, PeerEndAfter(), resume=True)
    return {"seconds": seconds_until_reached(run)}


def resume_ours(root: str, run: str) -> Measured:
    """Resume a run once, in this process, and return the seconds."""
    place = Path(root) / "lightning_logs" / run / "version_0"
    checkpoint = str(next(place.glob("checkpoints/epoch*")))
    line = [*our_command(Path(root), "--ckpt_path", checkpoint), "0"]
    gc.freeze()  # as the command does once it has imported a verb, which is here by now
    return {"seconds": seconds_until_reached(lambda: fine_tune(line))}


def compare(bench: Bench, pairs: int) -> None:
    """Save both checkpoints, then resume from them in turn."""
    root = bench.root
    save_model(root / "model", MODEL)
    rows = [json.dumps({"q": f"{i} + {i}?", "a": str(2 * i)}) + "\n" for i in range(ROWS)]
    (root / "rows.jsonl").write_text("".join(rows))
    seconds_until_reached(lambda: fine_tune([*our_command(root), str(NEAR + 1)]))
    run = root / "lightning_logs" / "run" / "version_0"
    advanced(next((run / "checkpoints").glob(f"*step={NEAR}")), root)
    Peer(root).train(NEAR, resume=False)
    sides = ["Trainer", "ours", "far"]

    def seconds_of(name: str) -> float:
        if name == "Trainer":
            leg = bench.leg("benchmarks.time_to_resume:resume_peer", root=str(root))
        else:
            run = {"ours": "run", "far": "far"}[name]
            leg = bench.leg("benchmarks.time_to_resume:resume_ours", root=str(root), run=run)
        return float(leg["seconds"])

    for name in sides:
        seconds_of(name)  # what it imports on the way is noted
    seconds: dict[str, list[float]] = defaultdict(list)
    for pair, name in by_turns(sides, pairs):
        seconds[name].append(seconds_of(name))
        at = f" at step {FAR:,}" if name == "far" else ""
        bench.say(f"pair {pair}, {name}{at}: {seconds[name][-1]:.2f} s to the first resumed step")
    of = "seconds to the first resumed step, ours"
    bench.ratio(f"{of} / Trainer", seconds["ours"], seconds["Trainer"], "must: at most 1")
    far = f"{of} at step {FAR:,} / at step {NEAR}"
    bench.ratio(far, seconds["far"], seconds["ours"], "must: within 0.2 of 1")
