"""Running out of memory changes nothing but the size of the micro-batches: same rows, same gradient, same rate."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import CommandLine, Outcome
from safetensors.torch import load_file

from fine_tune.modules import SFT, evaluation
from fine_tune.runs.run_folder import run_of

LORA = ["--model.lora.r", "4", "--model.lora.target_modules", '["q_proj", "v_proj"]']
NO_REHEARSAL = ["--vram_guard.rehearse", "false"]


class Device:
    """A device of any size, as the guard sees it; ``limit`` is the padded tokens that fit in one forward pass."""

    can_run_out = True

    def __init__(self, limit: int = 10**9, percent: float = 50.0) -> None:
        self.limit, self.percent, self.num_cleared = limit, percent, 0

    def total(self) -> int:
        return 10**10

    def used(self) -> int:
        return int(10**8 * self.percent)

    reserved = allocated = peak = used

    def reset_peak(self) -> None: ...

    def clear_cache(self) -> None:
        self.num_cleared += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Every run of the test is on this device, and its forward passes keep to the limit."""
    device = Device()
    monkeypatch.setattr("fine_tune.callbacks.vram_guard.memory_of", lambda _: device)
    for name in ("loss_sums", "evaluate"):
        run_out_above_limit(monkeypatch, name, device)
    return device


def run_out_above_limit(monkeypatch: pytest.MonkeyPatch, name: str, device: Device) -> None:
    original = getattr(SFT, name)

    def limited(self: SFT, micro_batch: Any) -> Any:
        if micro_batch["input_ids_BT"].numel() > device.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return original(self, micro_batch)

    monkeypatch.setattr(SFT, name, limited)


def once(step: int, original: Any, stage: str = "before") -> Any:
    """A method that runs out of memory the first time it is called at a step."""
    left = [True]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self if isinstance(self, SFT) else None
        now = module.trainer.global_step + 1 if module is not None else step
        if now == step and left[0]:
            left[0] = False
            if stage == "after":
                original(self, *args, **kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return original(self, *args, **kwargs)

    return failing


def weights(outcome: Outcome, name: str) -> dict[str, torch.Tensor]:
    last = outcome.run(name).checkpoint("last")
    assert last is not None
    return load_file(next(last.glob("*.safetensors")))


def assert_same(ours: Outcome, name: str, other: str = "straight", bound: float = 1e-6) -> None:
    mine, theirs = weights(ours, name), weights(ours, other)
    distance = torch.cat([(mine[k] - theirs[k]).flatten() for k in theirs]).norm()
    assert distance / torch.cat([w.flatten() for w in theirs.values()]).norm() <= bound
    rows, straight = ours.metrics(name), ours.metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in straight]
    assert [row["lr"] for row in rows] == [row["lr"] for row in straight]
    for row, expected in zip(rows, straight, strict=True):
        for key in ("train/loss", "val/loss", "val/token_accuracy"):
            assert bool(row[key]) == bool(expected[key])
            if row[key]:
                assert float(row[key]) == pytest.approx(float(expected[key]), rel=1e-5)


@pytest.mark.parametrize("settings", [[], LORA])
def test_forward_passes_that_do_not_fit_are_taken_in_smaller_parts(
    command_line: CommandLine, fit_args: list[str], device: Device, settings: list[str]
) -> None:
    args = [*fit_args, *settings, *NO_REHEARSAL]
    command_line("fit", *args, "--name", "straight")
    device.limit = 60
    outcome = command_line("fit", *args, "--name", "small")
    assert outcome.code == 0, outcome.err
    assert_same(outcome, "small")
    events = outcome.run("small").read()["events"]
    assert events[0]["step"] == 1
    assert "1,024 -> " in events[0]["event"]
    assert "out of memory in the step of step 1 (8 rows at once" in events[0]["event"]


@pytest.mark.usefixtures("device")
def test_a_backward_that_does_not_fit_is_taken_again(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [*fit_args, *NO_REHEARSAL]
    command_line("fit", *args, "--name", "straight")
    monkeypatch.setattr(SFT, "backward", once(3, SFT.backward, stage="after"))
    outcome = command_line("fit", *args, "--name", "small")
    assert_same(outcome, "small")
    assert [event["step"] for event in outcome.run("small").read()["events"]] == [3]


def test_the_budget_is_kept_when_the_run_goes_on(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--checkpoint.every", "2"]
    command_line("fit", *args, "--name", "straight")
    device.limit = 60
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "5"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert "out of memory" not in resumed.out.rpartition("precision: ")[2]
    assert_same(resumed, "run")


@pytest.mark.parametrize("budget", ["64", "128"])
def test_a_cut_budget_gives_way_to_another_one_that_is_asked_for(
    command_line: CommandLine, fit_args: list[str], device: Device, budget: str
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--data.max_tokens_per_micro_batch", "64"]
    device.limit = 60
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "5"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, "--checkpoint.every", "2", *stop)
    resumed = command_line(
        "fit", *args, "--ckpt_path", "last", "--data.max_tokens_per_micro_batch", budget
    )
    assert resumed.code == 0, resumed.err
    told = resumed.out.rpartition("precision: ")[2]
    assert ("tokens, cut earlier in this run" in told) == (budget == "64")
    assert ("was of another budget or device" in told) == (budget == "128")
    assert ("128 -> " in told) == (budget == "128")  # tried, and cut anew


@pytest.mark.parametrize("bad", [1, 3])
@pytest.mark.usefixtures("device")
def test_a_validation_row_that_does_not_fit_stops_and_all_rows_are_validated_when_it_goes_on(
    command_line: CommandLine, fit_args: list[str], bad: int
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--data.eval_batch_size", "1"]
    command_line("fit", *args, "--name", "straight")
    original, count = SFT.evaluate, [0]

    def unfit(self: SFT, micro_batch: Any) -> None:
        count[0] += 1
        if count[0] == bad:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        original(self, micro_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFT, "evaluate", unfit)
        stopped = command_line("fit", *args)
    assert stopped.code == 2 and "one row alone does not fit" in stopped.err
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same(resumed, "run", bound=0.0)
    for key in ("best", "best_score", "last", "status"):
        assert resumed.run().read()[key] == resumed.run("straight").read()[key]


@pytest.mark.usefixtures("device")
def test_an_answer_that_does_not_fit_names_its_setting_and_the_run_gets_its_result_later(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--generations.rows", "2", "--trainer.max_steps", "2"]
    original, calls = evaluation.generate, [0]

    def after_the_first(*given: Any) -> Any:
        calls[0] += 1
        return original(*given) if calls[0] == 1 else no_memory()

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate", after_the_first)
        stopped = command_line("fit", *args)
    assert stopped.code == 2 and "set --generations.max_new_tokens lower" in stopped.err
    assert not stopped.run().read().get("results")
    config = stopped.run().path / "config.yaml"
    assert f"resume: python -m fine_tune fit --config {config} --ckpt_path last" in stopped.err
    resumed = command_line("fit", "--config", config, "--ckpt_path", "last", root=False)
    assert resumed.code == 0, resumed.err
    assert [r["split"] for r in resumed.run().read()["results"]] == ["validation"]


@pytest.mark.usefixtures("device")
def test_going_back_passes_over_a_damaged_checkpoint(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--checkpoint.every", "2"]
    command_line("fit", *args, "--name", "straight")
    run_out_in_update(monkeypatch, 8)
    original = SFT.optimizer_step

    def damaging(self: SFT, *given: Any, **named: Any) -> Any:
        if self.trainer.global_step == 7:
            self.trainer.strategy.checkpoint_io.wait()  # type: ignore[attr-defined]
            file = run_of(self.trainer).checkpoint("last") / "model.safetensors"  # type: ignore[operator]
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        return original(self, *given, **named)

    monkeypatch.setattr(SFT, "optimizer_step", damaging)
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    assert "going back to epoch=1.00-step=5: 2 steps are redone" in outcome.out
    assert_same(outcome, "run")


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.usefixtures("device")
def test_an_adapters_update_that_does_not_fit_is_undone_and_taken_again(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    args = [*fit_args, *LORA, *NO_REHEARSAL]
    command_line("fit", *args, "--name", "straight")
    run_out_in_update(monkeypatch, step)
    outcome = command_line("fit", *args, "--name", "small")
    assert outcome.code == 0, outcome.err
    assert_same(outcome, "small", bound=0.0)
    assert "it was undone and taken again" in outcome.run("small").read()["events"][0]["event"]


@pytest.mark.usefixtures("device")
def test_an_update_of_all_weights_that_does_not_fit_goes_back_to_the_checkpoint(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [*fit_args, *NO_REHEARSAL, "--checkpoint.every", "2"]
    command_line("fit", *args, "--name", "straight")
    run_out_in_update(monkeypatch, 4)
    outcome = command_line("fit", *args, "--name", "small")
    assert outcome.code == 0, outcome.err
    assert "going back to epoch=0.40-step=2: 1 steps are redone" in outcome.out
    (event,) = outcome.run("small").read()["events"]
    assert (event["step"], event["kind"]) == (4, "out_of_memory")
    assert_same(outcome, "small", bound=0.0)
    assert outcome.run("small").read()["status"] == "finished"


@pytest.mark.usefixtures("device")
def test_an_adapters_update_that_does_not_fit_twice_stops_with_the_steps_before_it_saved(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, *LORA, *NO_REHEARSAL]
    command_line("fit", *args, "--name", "straight")
    with pytest.MonkeyPatch.context() as patch:
        run_out_in_update(patch, 4, 5)
        outcome = command_line("fit", *args)
    assert outcome.code == 2
    assert "update of step 4, twice: its state does not fit" in outcome.err
    last = outcome.run().checkpoint("last")
    assert last is not None and last.name.endswith("step=3")
    resumed = command_line("fit", *args, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same(resumed, "run", bound=0.0)


@pytest.mark.usefixtures("device")
def test_a_first_update_that_does_not_fit_twice_claims_no_save(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_in_update(monkeypatch, 1, 2)
    outcome = command_line("fit", *fit_args, *LORA, *NO_REHEARSAL)
    assert outcome.code == 2
    assert "The update was undone; make room on the device" in outcome.err
    assert not outcome.run().has_checkpoint()


def run_out_in_update(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    original, count = torch.optim.AdamW.step, [0]

    def failing(self: Any, closure: Any = None) -> Any:
        result = original(self, closure)  # weights and state are changed already
        count[0] += 1
        if count[0] in steps:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)


def test_evaluation_that_does_not_fit_gives_the_same_figures(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    run = command_line("fit", *fit_args, *NO_REHEARSAL).run()
    expected = run.read()["results"][-1]["metrics"]
    device.limit = 40
    config = run.path / "config.yaml"
    outcome = command_line("validate", "--config", config, "--ckpt_path", "best", root=False)
    assert outcome.code == 0, outcome.err
    assert "out of memory in the evaluation of step 10 (4 rows at once" in outcome.out
    assert {event["step"] for event in run.read()["events"]} == {10}  # of the weights measured
    for name, value in run.read()["results"][-1]["metrics"].items():
        assert value == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.usefixtures("device")
def test_answers_that_do_not_fit_are_written_a_few_at_a_time(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fine_tune.modules import evaluation

    sizes, original = [], evaluation.generate

    def limited(model: Any, prompts: list[list[int]], *args: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        return original(model, prompts, *args)

    monkeypatch.setattr(evaluation, "generate", limited)
    args = [*fit_args, *NO_REHEARSAL, "--trainer.max_steps", "1", "--generations.rows", "4"]
    outcome = command_line("fit", *args, "--generations.max_new_tokens", "3")
    assert outcome.code == 0, outcome.err
    assert max(sizes) > 2 and sizes.count(2) >= 2
    (event,) = outcome.run().read()["events"]  # once: from then on two are asked at a time
    assert event["step"] == 0 and event["kind"] == "out_of_memory"
    assert "in the generation of step 0 (4 rows at once, longest" in event["event"]
    assert event["event"] in outcome.out


def test_one_row_that_does_not_fit_is_a_clear_stop(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.limit = 10
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL)
    assert outcome.code == 2
    assert "out of memory in the step of step 1 with a row of" in outcome.err
    assert "--model.gradient_checkpointing true" in outcome.err
    assert "--data.max_length" in outcome.err


@pytest.mark.usefixtures("device")
def test_the_rehearsal_changes_nothing(command_line: CommandLine, fit_args: list[str]) -> None:
    args = [*fit_args, "--model.config.attention_dropout", "0.1", "--generations.rows", "2"]
    args += ["--generations.max_new_tokens", "2"]
    command_line("fit", *args, *NO_REHEARSAL, "--name", "straight")
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    assert "rehearsed: 8 rows of up to" in outcome.out
    assert "of disk are free" in outcome.out
    assert_same(outcome, "run", bound=0.0)
    assert not list(outcome.run().checkpoints.glob(".*"))


def test_the_rehearsal_finds_the_budget_before_step_1(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.limit = 60
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 0, outcome.err
    assert [event["step"] for event in outcome.run().read()["events"]] == [1, 1]
    assert outcome.out.index("out of memory") < outcome.out.index("rehearsed:")


@pytest.mark.usefixtures("device")
def test_rows_that_do_not_fit_together_are_no_row_that_does_not_fit_alone(
    command_line: CommandLine,
    fit_args: list[str],
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = [{"question": f"{i} * {i}?" + f" Kata {i}." * 25, "answer": "1"} for i in range(90, 100)]
    with open(rows_file, "a") as handle:
        handle.writelines(f"{json.dumps(row)}\n" for row in long)
    args = [*fit_args, *NO_REHEARSAL, "--data.max_tokens_per_micro_batch", "80"]
    command_line("fit", *args, "--name", "straight")
    original, alone = SFT.loss_sums, []

    def limited(self: SFT, micro_batch: Any) -> Any:
        rows, tokens = micro_batch["input_ids_BT"].shape
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
        alone.append(tokens if rows == 1 else 0)
        return original(self, micro_batch)

    monkeypatch.setattr(SFT, "loss_sums", limited)
    outcome = command_line("fit", *args, "--name", "small")
    assert outcome.code == 0, outcome.err
    assert max(alone) > 80
    assert_same(outcome, "small")
    for event in outcome.run("small").read()["events"]:
        rows, longest = re.findall(r"\((\d) rows at once, longest (\d+) tokens", event["event"])[0]
        assert int(rows) > 2 and int(longest) < 80


def test_a_budget_that_may_not_be_cut_below_what_failed_is_a_clear_stop(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.limit = 60
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--vram_guard.min_tokens", "1000")
    assert outcome.code == 2
    assert "out of memory in the step of step 1 (8 rows at once" in outcome.err
    assert "vram_guard.min_tokens 1,000 allows no smaller micro-batch" in outcome.err
    assert not outcome.run().read().get("events")


@pytest.mark.parametrize("where", ["its state", "its gradients"])
@pytest.mark.usefixtures("device")
def test_an_optimizer_whose_state_does_not_fit_is_told_before_step_1(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "its state":
        run_out_in_update(monkeypatch, 1)
    else:
        monkeypatch.setattr("fine_tune.callbacks.rehearsal.torch.zeros_like", no_memory)
    outcome = command_line("fit", *fit_args)
    assert outcome.code == 2
    assert "model.optimizer: the state of AdamW for" in outcome.err
    assert "before the first step, nothing has changed" in outcome.err
    for remedy in ("bitsandbytes.optim.PagedAdamW8bit", "--model.lora auto", "a smaller model"):
        assert remedy in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(outcome.run().checkpoints.glob("*"))


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. (injected)")


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ([], False),
        (["--model.gradient_checkpointing", "true"], True),
        (["--data.eval_batch_size", "3"], True),
        (["--model.attn_implementation", "eager"], True),
    ],
)
@pytest.mark.usefixtures("device")
def test_a_run_that_goes_on_is_rehearsed_again_only_where_its_memory_changed(
    command_line: CommandLine, fit_args: list[str], changed: list[str], again: bool
) -> None:
    args = [*fit_args, "--checkpoint.every", "2"]
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step", "5"]
    with pytest.raises(RuntimeError, match="a defect"):
        command_line("fit", *args, *stop)
    resumed = command_line("fit", *args, "--ckpt_path", "last", *changed)
    assert resumed.code == 0, resumed.err
    first, _, second = resumed.out.rpartition("precision: ")
    assert "rehearsed" in first and ("rehearsed" in second) == again


@pytest.mark.usefixtures("device")
def test_the_rehearsal_measures_a_whole_checkpoint_and_holds_it_against_the_disk(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*fit_args, "--checkpoint.keep", "2"]
    plenty = command_line("fit", *args, "--name", "plenty")
    last = plenty.run("plenty").checkpoint("last")
    assert last is not None
    num_bytes = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
    shown = float(re.findall(r"a checkpoint has ([\d.]+) GB", plenty.out)[0]) * 1e9
    assert shown == pytest.approx(num_bytes, rel=0.05, abs=5e5)  # the optimizer's state included
    assert "checkpoint.keep 2 holds up to" not in plenty.out
    usage = shutil.disk_usage(plenty.root)
    for times, told in ((3.5, True), (4.5, False)):  # two of the best, the last, one being written
        now = usage._replace(free=int(times * num_bytes))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, now=now: now)
        outcome = command_line("fit", *args, "--name", f"times_{int(times)}")
        assert outcome.code == 0, outcome.err
        assert ("checkpoint.keep 2 holds up to 4 checkpoints at once" in outcome.out) == told


def test_the_budget_is_cut_before_a_device_is_full(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.percent = 96.0
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--trainer.max_steps", "2")
    assert outcome.code == 0, outcome.err
    assert "the device is nearly full: 1,024 -> 512 tokens per micro-batch" in outcome.out
    assert "96 % of the device's 9.3 GiB are used" in outcome.out
    assert float(outcome.metrics()[0]["perf/memory_used_percent"]) == pytest.approx(96.0)


def test_a_device_that_stays_nearly_full_is_told_once_for_each_smaller_budget(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.percent = 96.0
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL, "--data.epochs", "6")
    assert outcome.code == 0, outcome.err
    steps = len([row for row in outcome.metrics() if row["train/loss"]])
    assert steps >= 24 and device.num_cleared == steps  # caches are given back before each
    events = [event["event"] for event in outcome.run().read()["events"]]
    budgets = [re.findall(r"([\d,]+) -> ([\d,]+) tokens", event)[0] for event in events]
    cuts = [tuple(int(number.replace(",", "")) for number in pair) for pair in budgets]
    assert all(after < before for before, after in cuts)
    assert [before for before, _ in cuts[1:]] == [after for _, after in cuts[:-1]]
    assert len(cuts) < 12
    assert outcome.out.count("of the device's 9.3 GiB are used") == 1


def test_below_the_threshold_no_cache_is_cleared(
    command_line: CommandLine, fit_args: list[str], device: Device
) -> None:
    device.percent = 94.0
    outcome = command_line("fit", *fit_args, *NO_REHEARSAL)
    assert outcome.code == 0, outcome.err
    assert device.num_cleared == 0
    assert outcome.out.count("of the device's 9.3 GiB are used") == 1


class SharedDevice(Device):
    """Forward and backward take ``per_token`` bytes a padded token; another process may hold ``others``."""

    per_token, others = 10**6, 0
    _peak = 10**8

    def used(self) -> int:
        return 10**8 + self.others

    def allocated(self) -> int:
        return 10**8

    reserved = allocated

    def peak(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = 10**8


def test_the_budget_is_cut_before_a_step_that_would_not_fit(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SharedDevice()
    monkeypatch.setattr("fine_tune.callbacks.vram_guard.memory_of", lambda _: device)
    original = SFT.loss_sums

    def taking(self: SFT, micro_batch: Any) -> Any:
        device._peak = max(
            device._peak, 10**8 + device.per_token * micro_batch["input_ids_BT"].numel()
        )
        if self.trainer.global_step == 5:  # from the seventh step on there is room for 50 tokens
            device.others = device.total() - 10**8 - 50 * device.per_token
        return original(self, micro_batch)

    monkeypatch.setattr(SFT, "loss_sums", taking)
    outcome = command_line("fit", *fit_args, "--vram_guard.threshold_percent", "100")
    assert outcome.code == 0, outcome.err
    (event,) = outcome.run().read()["events"]
    assert event["step"] == 7
    assert "the device has room for about 50 padded tokens, the step would take" in event["event"]
    assert "-> 50 tokens per micro-batch" in event["event"]


def test_settings_of_the_guard_are_checked(command_line: CommandLine, fit_args: list[str]) -> None:
    outcome = command_line("fit", *fit_args, "--vram_guard.threshold_percent", "120")
    assert outcome.code == 2
    assert "threshold_percent 120.0 lies above 0 and up to 100" in outcome.err


def test_the_guard_can_be_set_in_yaml(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text(yaml.safe_dump({"vram_guard": {"rehearse": False}}))
    outcome = command_line("fit", "--config", file, *fit_args, "--trainer.max_steps", "1")
    assert outcome.code == 0, outcome.err
    assert "rehearsed" not in outcome.out
