"""Milliseconds training stands still for a checkpoint: ours beside transformers.Trainer, alternating in one run.

The same model (about 50M random weights, full fine-tuning), the same AdamW, the same rows, a save every 20 steps. What
is counted is what the user waits for: from the end of a step that saves to where the next step can begin.

    python benchmarks/checkpoint_stall.py [--pairs 3] [--steps 100]
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from importlib import metadata
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

from fine_tune.__main__ import main as fine_tune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small_models import save_small_model

EVERY = 20
MODEL = {
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
            *("--trainer.callbacks+=checkpoint_stall.OurStall", "--trainer.callbacks.file"),
            str(stall),
        ]
    )
    assert code == 0
    return json.loads(stall.read_text()), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    asked = parser.parse_args()
    packages = ("torch", "lightning", "transformers", "accelerate", "safetensors")
    print(platform.platform(), *(f"{name} {metadata.version(name)}" for name in packages))
    root = Path(tempfile.mkdtemp(prefix="checkpoint_stall_"))
    try:
        model = save_small_model(root / "model", max_position_embeddings=128, **MODEL)
        print(f"{model.num_parameters() / 1e6:.1f}M weights, a save every {EVERY} steps")
        ratios, together = [], []
        for pair in range(asked.pairs):
            runs = [("peer", run_peer), ("ours", run_ours)]
            measured = {}
            for name, run in runs if pair % 2 == 0 else reversed(runs):
                stalls, seconds = run(root / "model", root / "run", asked.steps)
                shutil.rmtree(root / "run")
                measured[name] = stalls
                shown = " ".join(f"{ms:.0f}" for ms in stalls)
                print(f"pair {pair} {name}: blocked {shown} ms; the run took {seconds:.1f} s")
            ratios.append(statistics.median(measured["ours"]) / statistics.median(measured["peer"]))
            together.append(sum(measured["ours"]) / sum(measured["peer"]))
        _print_ratios("median of the saves", ratios)
        _print_ratios("all saves together, the last one waited for", together)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _print_ratios(of: str, ratios: list[float]) -> None:
    print(
        f"blocked, ours / transformers.Trainer, {of}: median {statistics.median(ratios):.2f} "
        f"(min {min(ratios):.2f}, max {max(ratios):.2f}, {len(ratios)} pairs)"
    )


if __name__ == "__main__":
    main()
