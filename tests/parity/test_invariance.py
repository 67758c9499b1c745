"""What must not change a result: the micro-batch, the number of processes, the evaluation batch, a loss scaler."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from parity_runs import (
    BATCH_SIZE,
    CLIP,
    NUM_ROWS,
    NUM_STEPS,
    arguments,
    max_relative,
    relative_l2,
    run_of,
    run_ours,
    weights_of,
)
from torch import Tensor

import fine_tune
from fine_tune.data import SFTData
from fine_tune.loggers import MetricsCSV
from fine_tune.modules import SFT

# Padded tokens per micro-batch: every row alone; a few rows, cut unevenly; half a step.
BUDGETS = (1, 128, 400)
MICRO_BATCH_BOUNDS = {"64-true": 1e-11, "32-true": 5e-6}
PROCESSES_BOUND = 1e-5
EVALUATION_BOUND = 1e-6
PROCESSES_TIMEOUT_SECONDS = 120
SmallModel = Callable[[str], Path]


@pytest.mark.parametrize("precision", MICRO_BATCH_BOUNDS)
@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        pytest.param("phi", marks=pytest.mark.slow),
        pytest.param("qwen2", marks=pytest.mark.slow),
    ],
)
def test_any_micro_batch_size_gives_the_same_weights(
    architecture: str, precision: str, small_model: SmallModel, prompt_rows: Path, root: Path
) -> None:
    def weights(budget: str) -> dict[str, Tensor]:
        run = run_ours(
            "fit",
            root,
            small_model(architecture),
            prompt_rows,
            f"--trainer.precision={precision}",
            f"--data.max_tokens_per_micro_batch={budget}",
        )
        return weights_of(run.checkpoint, torch.float64)

    whole_step = weights("null")
    differences = {budget: relative_l2(weights(str(budget)), whole_step) for budget in BUDGETS}
    moved = relative_l2(whole_step, weights_of(small_model(architecture), torch.float64))
    shown = ", ".join(f"{budget} tokens {d:.1e}" for budget, d in differences.items())
    print(f"\n{architecture} {precision}: {shown} (moved {moved:.2f})")
    assert moved > 0.01
    assert max(differences.values()) < MICRO_BATCH_BOUNDS[precision]


@pytest.mark.parametrize(
    ("batch_size", "budget"),
    [
        (BATCH_SIZE, "null"),
        # 48 rows: every second step holds one row, so that one process has none
        pytest.param(NUM_ROWS - 1, "128", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(
    batch_size: int, budget: str, small_model: SmallModel, prompt_rows: Path, root: Path
) -> None:
    model, size = small_model("llama"), f"--data.batch_size={batch_size}"
    one = run_ours("fit", root, model, prompt_rows, size)
    line = arguments(
        "fit",
        root,
        model,
        prompt_rows,
        size,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--data.max_tokens_per_micro_batch={budget}",
    )
    _in_own_process(line)
    two = run_of(line)

    weights = relative_l2(weights_of(two.checkpoint), weights_of(one.checkpoint))
    losses = max_relative(two.column("train/loss"), one.column("train/loss"))
    norms = max_relative(two.column("grad_norm"), one.column("grad_norm"))
    print(
        f"\n2 processes, batch {batch_size}, budget {budget}: weights {weights:.1e}, "
        f"losses {losses:.1e}, norms {norms:.1e}"
    )
    assert len(two.column("train/loss")) == NUM_STEPS
    assert weights < PROCESSES_BOUND
    assert losses < PROCESSES_BOUND


def test_evaluation_does_not_depend_on_the_batch_size(
    small_model: SmallModel, prompt_rows: Path, root: Path
) -> None:
    def metrics(eval_batch_size: int) -> dict[str, float]:
        run = run_ours(
            "validate",
            root,
            small_model("llama"),
            prompt_rows,
            '--data.split={"validation": 40, "test": 4}',
            f"--data.eval_batch_size={eval_batch_size}",
        )
        return run.record["results"][-1]["metrics"]

    one, *others = (metrics(size) for size in (1, 8, 32))
    names = ("val/loss", "val/perplexity", "val/token_accuracy")
    differences = [abs(other[n] - one[n]) / one[n] for other in others for n in names]
    print(f"\nevaluation batch 8 and 32 against 1: {max(differences):.1e} of {one}")
    assert 6 < one["val/loss"] < 8
    assert max(differences) < EVALUATION_BOUND


class ScaledFloat32(MixedPrecision):
    """A loss scaler around float32: all that a scaler does, without the rounding of half precision."""

    def forward_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def test_a_loss_scaler_changes_neither_clipping_nor_update(
    small_model: SmallModel, prompt_rows: Path, root: Path
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=NUM_STEPS)
    reference = _fit(small_model("llama"), prompt_rows, root / "unscaled")
    scaled = _fit(
        small_model("llama"),
        prompt_rows,
        root / "scaled",
        plugins=ScaledFloat32("16-mixed", "cpu", scaler=scaler),
    )

    weights = relative_l2(scaled.weights, reference.weights)
    norms = max_relative(scaled.norms, reference.norms)
    print(f"\nscaler around float32: weights {weights:.1e}, grad_norm {norms:.1e}")
    assert scaler.get_scale() == 2.0**17  # it scaled every step, and skipped none
    assert max(reference.norms) > CLIP
    assert norms < 1e-6
    assert weights < 1e-6


def test_half_precision_on_cpu_clips_unscaled_gradients(
    small_model: SmallModel, prompt_rows: Path, root: Path
) -> None:
    """One step of plain gradient descent with rate 1 moves the weights by the clipped gradient itself."""
    options: dict[str, Any] = {"num_steps": 1, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    start = weights_of(small_model("llama"))
    reference = _fit(small_model("llama"), prompt_rows, root / "sgd32", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    half = _fit(
        small_model("llama"),
        prompt_rows,
        root / "sgd16",
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
        **options,
    )

    moved = float(sum((half.weights[n] - start[n]).double().square().sum() for n in start) ** 0.5)
    norms = max_relative(half.norms, reference.norms)
    print(
        f"\n16-mixed on CPU: grad_norm {half.norms[0]:.4f} (float32 {reference.norms[0]:.4f}, relative {norms:.1e}), "
        f"update {moved:.6f}, clip {CLIP}"
    )
    assert reference.norms[0] > CLIP
    assert 0 < norms < 1e-2  # fp16 has 11 bits; scaled by 1024 it would be off by 102,300 %
    assert moved == pytest.approx(CLIP, rel=1e-5)
    assert relative_l2(half.weights, reference.weights) < 1e-2


class _Fitted:
    """Weights and logged norms of a run without the command line."""

    def __init__(self, module: SFT, folder: Path) -> None:
        assert module.model is not None
        self.weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
        rows = (folder / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("grad_norm")
        self.norms = [float(row.split(",")[column]) for row in rows[1:]]


def _fit(
    model: Path,
    rows: Path,
    folder: Path,
    *,
    num_steps: int = NUM_STEPS,
    optimizer: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-3),
    plugins: Any = None,
) -> _Fitted:
    folder.mkdir()
    data = SFTData(
        path=str(rows),
        split="none",
        batch_size=BATCH_SIZE,
        max_tokens_per_micro_batch=128,
        cache_dir=str(folder.parent / "lightning_logs" / ".cache"),
        tokenizer=str(model),
    )
    module = SFT(str(model), optimizer=optimizer, lr_scheduler="constant")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        gradient_clip_val=CLIP,
        log_every_n_steps=1,
        logger=MetricsCSV(folder),
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == num_steps
    return _Fitted(module, folder)


def _in_own_process(line: list[str]) -> None:
    """Run a command line in a process of its own: a strategy of several starts the others from it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fine_tune", *line],
        cwd=Path(fine_tune.__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PROCESSES_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
        output, _ = process.communicate()
        pytest.fail(f"no end within {PROCESSES_TIMEOUT_SECONDS} seconds, after:\n{output}")
    assert process.returncode == 0, output
