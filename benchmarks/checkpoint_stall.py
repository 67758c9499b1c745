"""C6, saving: milliseconds training stands still for a checkpoint, ours beside transformers.Trainer, by turns.

The same model (about 50M random weights, full fine-tuning), the same AdamW, the same rows, a save every 20 steps. What
is counted is what the user waits for: from the end of a step that saves to where the next step can begin.
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.harness import Bench, by_turns
from benchmarks.inputs import save_model
from fine_tune.__main__ import main as fine_tune

EVERY = 20
NUM_STEPS = 100
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "max_position_embeddings": 128,
    "hidden_size": 640,
    "intermediate_size": 1920,
    "num_hidden_layers": 9,
    "num_attention_heads": 10,
}


class Stall(TrainerCallback):
    """Time from the end of a saving step to the end of its save."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self._start = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.milliseconds.append(1000 * (time.perf_counter() - self._start))


def run_peer(model_folder: Path, folder: Path, steps: int) -> tuple[list[float], float]:
    """Train with transformers.Trainer; return the milliseconds of each save, and the run's seconds."""
    stall = Stall()
    ids = [5, 6, 7, 8] * 4
    rows = [{"input_ids": ids, "labels": ids} for _ in range(steps)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=EVERY,
        save_total_limit=1,
        optim="adamw_torch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = LlamaForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = Trainer(
        model, arguments, train_dataset=rows, callbacks=[stall], processing_class=tokenizer
    )
    start = time.perf_counter()
    trainer.train()
    return stall.milliseconds, time.perf_counter() - start


class OurStall(Callback):
    """The same for Lightning: from the end of a saving step to the beginning of the next, its data included.

    Args:
        file: Where the milliseconds are written at the end.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.milliseconds: list[float] = []
        self._start = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._start = time.perf_counter() if trainer.global_step % EVERY == 0 else 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._stop()

    def on_train_end(self, *args: Any) -> None:
        self._stop()  # the last save is waited for: nothing is left to do beside it
        self.file.write_text(json.dumps(self.milliseconds))

    def _stop(self) -> None:
        if self._start:
            self.milliseconds.append(1000 * (time.perf_counter() - self._start))
        self._start = 0.0


def run_ours(model_folder: Path, folder: Path, steps: int) -> tuple[list[float], float]:
    """Train with this project; return the milliseconds of each save, and the run's seconds."""
    folder.mkdir()
    rows, stall = folder / "rows.jsonl", folder / "stall.json"
    lines = [json.dumps({"q": f"{i} + {i}?", "a": str(2 * i)}) + "\n" for i in range(steps)]
    rows.write_text("".join(lines))
    start = time.perf_counter()
    code = fine_tune(
        [
            *("fit", "--model", "fine_tune.modules.SFT", "--trainer.default_root_dir", str(folder)),
            *("--model.model_name_or_path", str(model_folder)),
            *("--data", "fine_tune.data.SFTData", "--data.path", str(rows)),
            *("--data.prompt", "{q}", "--data.completion", "{a}", "--data.split", "none"),
            *("--data.batch_size", "1", "--data.epochs", "1", "--trainer.max_steps", str(steps)),
            *("--checkpoint.every", str(EVERY), "--checkpoint.keep", "1"),
            *("--generations.rows", "0", "--trainer.enable_progress_bar", "false"),
            *(
                "--trainer.callbacks+=benchmarks.checkpoint_stall.OurStall",
                "--trainer.callbacks.file",
            ),
            str(stall),
        ]
    )
    assert code == 0
    return json.loads(stall.read_text()), time.perf_counter() - start


def compare(bench: Bench, pairs: int, steps: int = NUM_STEPS) -> None:
    """Train and save with both, by turns."""
    described, _ = save_model(bench.root / "saved", MODEL)
    bench.say(f"{described}, a save every {EVERY} steps")
    sides = {"Trainer": run_peer, "ours": run_ours}
    medians: dict[str, list[float]] = {name: [] for name in sides}
    sums: dict[str, list[float]] = {name: [] for name in sides}
    for pair, name in by_turns(list(sides), pairs):
        folder = bench.root / "stalled"
        stalls, seconds = sides[name](bench.root / "saved", folder, steps)
        shutil.rmtree(folder)
        medians[name].append(statistics.median(stalls))
        sums[name].append(sum(stalls))
        shown = " ".join(f"{ms:.0f}" for ms in stalls)
        bench.say(f"pair {pair}, {name}: blocked {shown} ms; the run took {seconds:.1f} s")
    of = "blocked, ours / Trainer"
    targets = "must: at most 0.4, aim: 0.1"
    bench.ratio(f"{of}, median of the saves", medians["ours"], medians["Trainer"], targets)
    last = "all saves together, the last one waited for"
    bench.ratio(f"{of}, {last}", sums["ours"], sums["Trainer"], "no target")
