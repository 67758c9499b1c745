"""CPU seconds inside guards, provenance and snapshots, as a share of 200 training steps (must: at most 2 %).

The model of C1: 8 layers, width 256, 32,000 tokens, full fine-tuning, 16 rows a step, about 40 % supervised.
    python -m benchmarks.guard_overhead [--steps 200]
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import WORDS
from fine_tune.cli import main
from fine_tune.quiet import quiet_libraries

REPOSITORY = Path(__file__).parent.parent
MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}


def timed(seconds: dict[str, float], cls: type, names: list[str]) -> None:
    """Add the CPU seconds of these methods to ``seconds`` under the class's name."""
    for name in names:
        original = getattr(cls, name)

        def method(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return original(self, *args, **kwargs)
            finally:
                seconds[cls.__name__] += time.process_time() - start

        setattr(cls, name, method)


def write_rows(file: Path, count: int) -> None:
    """Write rows whose answers are about two fifths of their tokens."""
    draw = random.Random(0)
    with open(file, "w") as handle:
        for _ in range(count):
            length = draw.randint(20, 120)
            question, answer = (
                draw.choices(WORDS, k=k) for k in (length * 3 // 5, length * 2 // 5)
            )
            handle.write(
                json.dumps({"question": " ".join(question), "answer": " ".join(answer)}) + "\n"
            )


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    quiet_libraries()
    from fine_tune.callbacks.loss_spikes import LossSpikes
    from fine_tune.callbacks.precision_fallback import PrecisionFallback
    from fine_tune.callbacks.progress import TrainingProgress
    from fine_tune.callbacks.step_rows import StepRows
    from fine_tune.callbacks.stop_signals import StopSignals
    from fine_tune.callbacks.vram_guard import VRAMGuard
    from fine_tune.modules.trained_state import TrainedState
    from fine_tune.runs.snapshot import Snapshot

    inside: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = {}
    hooks = ["on_train_batch_start", "on_train_batch_end"]
    for cls in (VRAMGuard, PrecisionFallback, StepRows, LossSpikes, StopSignals):
        timed(inside, cls, [name for name in hooks if name in vars(cls)])
    timed(inside, Snapshot, ["take"])
    timed(inside, TrainedState, ["__init__"])
    started, ended = TrainingProgress.on_train_start, TrainingProgress.on_train_end

    def start(self: Any, *args: Any) -> None:
        started(self, *args)
        inside.clear()  # what comes before step 1 is not of the steps
        whole["start"] = time.process_time()

    def end(self: Any, *args: Any) -> None:
        whole["seconds"] = time.process_time() - whole["start"]
        ended(self, *args)

    TrainingProgress.on_train_start, TrainingProgress.on_train_end = start, end  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", 2000)
        code = main(
            [
                *(
                    "fit",
                    "--model",
                    "fine_tune.modules.SFT",
                    "--model.from_config",
                    json.dumps(MODEL),
                ),
                *("--model.tokenizer", str(REPOSITORY / "fine_tune/quickstart/tokenizer")),
                *("--data", "fine_tune.data.SFTData", "--data.path", f"{folder}/rows.jsonl"),
                *("--data.prompt", "{question}", "--data.completion", " {answer}"),
                *("--data.split", "none", "--data.batch_size", "16"),
                *("--trainer.max_steps", str(steps), "--trainer.default_root_dir", folder),
                *("--checkpoint.every", "100", "--trainer.accelerator", "cpu"),
            ]
        )
    assert code == 0
    print(
        f"\npython {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{steps} steps: {whole['seconds']:.1f} CPU seconds")
    for name, seconds in sorted(inside.items()):
        print(f"  {name:<18} {seconds:8.3f} s  {100 * seconds / whole['seconds']:.3f} %")
    share = 100 * sum(inside.values()) / whole["seconds"]
    print(
        f"  together           {sum(inside.values()):8.3f} s  {share:.3f} %   (must: at most 2 %)"
    )
    sys.exit(0 if share <= 2 else 1)


if __name__ == "__main__":
    run()
