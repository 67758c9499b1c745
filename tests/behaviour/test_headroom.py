"""A budget that the plan chose is held against what the rehearsal measures: the largest that leaves the headroom."""

from typing import Any

import pytest
import yaml
from harness import CommandLine, Outcome

from fine_tune.modules import SFT

LENGTH, ROWS = 24, 8  # the longest row of these runs, and the rows of a step
AUTO = ["--data.max_tokens_per_micro_batch", "auto"]
SIZE, BASE, PER_ROW = 1_000_000_000, 300_000_000, 100_000_000


class Played:
    """A device on which a pass takes a fixed part and one for each row at once."""

    can_run_out = True

    def __init__(self, per_row: int = PER_ROW, others: int = 0) -> None:
        self.per_row, self.others = per_row, others
        self.rows = 0.0  # the most at once, of the longest

    def total(self) -> int:
        return SIZE

    def used(self) -> int:
        return self.allocated() + self.others

    def allocated(self) -> int:
        return 10_000_000

    reserved = allocated

    def peak(self) -> int:
        return int(BASE + self.per_row * self.rows) if self.rows else self.allocated()

    def reset_peak(self) -> None:
        self.rows = 0.0

    def clear_cache(self) -> None: ...


def fit_on(
    device: Played, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> Outcome:
    for name in ("loss_sums", "evaluate"):
        original = getattr(SFT, name)

        def counted(self: SFT, micro_batch: Any, original: Any = original) -> Any:
            device.rows = max(device.rows, micro_batch["input_ids_BT"].numel() / LENGTH)
            return original(self, micro_batch)

        monkeypatch.setattr(SFT, name, counted)
    monkeypatch.setattr("fine_tune.callbacks.vram_guard.memory_of", lambda _: device)
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize(
    ("per_row", "others", "split", "rows"),
    [
        (PER_ROW, 150_000_000, "none", 4),  # another process has its part
        (50_000_000, 0, "none", 8),  # all rows at once leave the headroom
        (620_000_000, 0, "{train: 0.8, validation: 0.2}", 1),  # not even one row does
    ],
)
def test_a_budget_the_plan_chose_is_cut_to_the_largest_that_leaves_the_headroom(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    per_row: int,
    others: int,
    split: str,
    rows: int,
) -> None:
    device = Played(per_row, others)
    args = [*fit_args, *AUTO, "--data.split", split, "--trainer.max_steps", "1"]
    outcome = fit_on(device, command_line, monkeypatch, args)
    config = yaml.safe_load((outcome.run().path / "config.yaml").read_text())
    assert config["data"]["init_args"]["max_tokens_per_micro_batch"] == LENGTH * ROWS  # as chosen
    events = [event["event"] for event in outcome.run().read().get("events", [])]
    assert bool(events) == (rows < ROWS)
    if events:
        assert "rehearsed: 8 rows of 24 tokens at once take " in events[0]
        assert "leave 10% of the device free: 192 -> " in events[0]
        assert events[-1].endswith(f"-> {LENGTH * rows} tokens per micro-batch")
    assert ("a smaller micro-batch would not" in outcome.out) == (rows == 1)


def test_a_budget_of_ones_own_is_left_alone(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["--data.max_tokens_per_micro_batch", LENGTH * ROWS, "--trainer.max_steps", 1]
    device = Played(per_row=80_000_000)
    outcome = fit_on(device, command_line, monkeypatch, [*fit_args, *map(str, own)])
    assert not outcome.run().read().get("events")
    assert "peak 0.94 GB of 1.0 GB (94 %)" in outcome.out


def test_the_cut_is_kept_when_the_run_goes_on(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "3"]
    args = [*fit_args, *AUTO, "--checkpoint.every", "2"]
    with pytest.raises(RuntimeError, match="a defect"):
        fit_on(Played(), command_line, monkeypatch, [*args, *stop])
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    # 0.3 + 6 x 0.1 GB of 1 GB are 90 %, 7 rows would be more
    assert f"micro-batches: {LENGTH * 6} tokens, cut earlier in this run" in resumed.out


def test_a_budget_that_may_not_be_smaller_is_no_event(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = ["--vram_guard.min_tokens", str(LENGTH * ROWS), "--trainer.max_steps", "1"]
    outcome = fit_on(Played(), command_line, monkeypatch, [*fit_args, *AUTO, *least])
    assert not outcome.run().read().get("events")
    assert "vram_guard.min_tokens 192 allows no smaller micro-batch" in outcome.out
    assert "a smaller micro-batch would not" not in outcome.out
