"""The precision a run starts with, and targets that nothing would be held against."""

import math

import pytest
import torch

from fine_tune.plan_checks import target_problems
from fine_tune.trainer_settings import choose_precision


@pytest.mark.parametrize(
    ("gpu", "bf16", "accelerator", "asked", "expected"),
    [
        (True, True, "auto", None, ("bf16-mixed", "the GPU computes in bfloat16")),
        (True, False, "auto", None, ("16-mixed", "the GPU has no bfloat16")),
        (True, True, "cuda", "16-mixed", ("16-mixed", "as asked")),
        (True, True, "cpu", None, ("32-true", "the default on a CPU")),
        (False, False, "auto", None, ("32-true", "the default on a CPU")),
        (False, False, "auto", "bf16-mixed", ("bf16-mixed", "as asked")),
        (False, False, "auto", "16-mixed", ("bf16-mixed", "16-mixed asked; a CPU computes it in bfloat16")),
        (True, True, "cpu", "16-mixed", ("bf16-mixed", "16-mixed asked; a CPU computes it in bfloat16")),
    ],
)  # fmt: skip
def test_precision_is_what_was_asked_or_what_the_device_can_do(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    bf16: bool,
    accelerator: str,
    asked: str | None,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_precision(accelerator, asked) == expected


def test_targets_that_nothing_is_held_against_are_told() -> None:
    measured = ("loss", "perplexity")
    assert target_problems({"val/loss": 1.5}, measured, {"validation"}) == []
    answered = (*measured, "test/exact_match")
    assert target_problems({"test/exact_match": 0.9}, answered, {"validation", "test"}) == []
    told = target_problems(
        {"val_loss": 1.0, "test/loss": 2.0, "val/perplexity": math.nan}, measured, {"validation"}
    )
    known = "known: val/loss, val/perplexity"
    assert told == [
        f"targets: 'val_loss' is not measured; did you mean 'val/loss'?; {known}",
        f"targets: 'test/loss' is not measured; set test_at_end: true; {known}",
        "targets: val/perplexity: a number is wanted, got nan",
    ]
    assert "known: " in target_problems({"val/loss": 1.0}, measured, set())[0]
