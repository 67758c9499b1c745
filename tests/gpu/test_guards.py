"""The guards on a real device: memory that runs out, and gradients that overflow in half precision."""

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import CommandLine, Outcome, write_rows
from small_models import save_small_model

from fine_tune.modules import SFT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
]
ROOM = (
    2**29
)  # bytes a process may use; 16,000 tokens at once take about four times as much, a row a seventh
ROWS, WORDS = 64, 400


@pytest.fixture
def small_device() -> Iterator[None]:
    """A device of half a GiB: torch refuses to allocate more, as it does where there is no more."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM / total), 0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


@pytest.fixture
def gpu_args(tmp_path: Path) -> list[str]:
    """One GPU, float32, two steps of 32 rows of about 400 words each."""
    folder = tmp_path / "llama"
    save_small_model(folder, max_position_embeddings=4096, hidden_size=256, num_hidden_layers=4)
    rows = [
        {"question": " ".join(f"k{i * WORDS + k}" for k in range(WORDS - i)), "answer": f"{i} satu"}
        for i in range(ROWS)
    ]
    file = write_rows(tmp_path / "long.jsonl", rows)
    return [
        *("--model", "SFT", "--model.model_name_or_path", str(folder)),
        *("--data", "SFTData", "--data.path", str(file)),
        *("--data.prompt", "{question}", "--data.completion", " {answer}"),
        *("--data.max_length", "512"),
        *(
            "--data.batch_size",
            "32",
            "--trainer.max_steps",
            "2",
            "--trainer.log_every_n_steps",
            "1",
        ),
        *("--trainer.accelerator", "gpu", "--trainer.devices", "1", "--model.optimizer.lr", "1e-4"),
        *("--model.gradient_checkpointing", "false", "--generations.rows", "0"),
        *("--vram_guard.rehearse", "false"),
    ]


def first_gradient(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Catch the gradient of the first step that gave one, in float64 on the host."""
    caught: dict[str, torch.Tensor] = {}
    original = SFT.gradients

    def catching(self: SFT, batch: Any) -> Any:
        gradient = original(self, batch)
        if gradient.failure is None and not caught:
            named = self.named_parameters()
            caught.update({n: p.grad.double().cpu() for n, p in named if p.grad is not None})
        return gradient

    monkeypatch.setattr(SFT, "gradients", catching)
    return caught


def losses(outcome: Outcome, name: str) -> list[float]:
    return [float(row["train/loss"]) for row in outcome.metrics(name) if row["train/loss"]]


def test_a_real_out_of_memory_is_recovered_with_the_same_gradient(
    command_line: CommandLine,
    gpu_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    whole = [*gpu_args, "--trainer.precision", "32-true"]
    whole += ["--data.max_tokens_per_micro_batch", "1000000"]
    with monkeypatch.context() as patch:
        expected = first_gradient(patch)
        undivided = command_line("fit", *whole, "--name", "undivided")
    assert undivided.code == 0, undivided.err
    assert not undivided.run("undivided").read().get("events")
    request.getfixturevalue("small_device")
    with monkeypatch.context() as patch:
        found = first_gradient(patch)
        recovered = command_line("fit", *whole, "--name", "recovered")
    assert recovered.code == 0, recovered.err
    events = [event["event"] for event in recovered.run("recovered").read()["events"]]
    assert any("out of memory in the step of step 1" in event for event in events)
    cuts = [int(re.findall(r"-> ([\d,]+) tokens", e)[0].replace(",", "")) for e in events]
    assert cuts == sorted(set(cuts), reverse=True)
    assert found.keys() == expected.keys() and found
    distance = sum(float((found[n] - expected[n]).square().sum()) for n in found) ** 0.5
    norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    print(f"\nrelative L2 of the recovered gradient: {distance / norm:.2e}; cuts {cuts}")
    assert distance / norm < 1e-6
    assert losses(recovered, "recovered") == pytest.approx(losses(undivided, "undivided"), rel=1e-5)


def test_an_overflow_in_half_precision_skips_no_step(
    command_line: CommandLine, gpu_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float | None] = []  # None: the gradient was of no use
    original = SFT.gradients

    def watching(self: SFT, batch: Any) -> Any:
        scaler: Any = self.trainer.precision_plugin.scaler  # type: ignore[union-attr]
        if not scales:  # so large a scale that the first gradients overflow
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
        gradient = original(self, batch)
        scales.append(None if gradient.failure is not None else scaler.get_scale())
        return gradient

    monkeypatch.setattr(SFT, "gradients", watching)
    args = [*gpu_args, "--trainer.max_steps", "4", "--data.epochs", "4"]
    args += ["--precision_fallback.max_skips", "40", "--trainer.precision", "16-mixed"]
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    usable = [scale for scale in scales if scale is not None]
    assert len(usable) < len(scales), "no overflow was provoked"
    assert len(usable) == 4  # each step's rows were taken until they gave a gradient
    assert max(usable) < 2.0**40
    rows = [row for row in outcome.metrics() if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(torch.isfinite(torch.tensor(float(row["train/loss"]))) for row in rows)
    assert outcome.run().read()["status"] == "finished"
