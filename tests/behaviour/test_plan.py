"""What ``plan`` says of a step's memory is what a step takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import TOKENIZER, CommandLine, write_rows
from lora_runs import SIZES, save_model
from small_models import save_small_model
from torch import Tensor

from fine_tune.device_memory import HostMemory
from fine_tune.memory import LiveBytes, bytes_held
from fine_tune.modules.memory_plan import MemoryPlanner, StepMemory
from fine_tune.modules.memory_ways import Way, ways_to_train
from fine_tune.modules.optimization import build_optimizer
from fine_tune.modules.precision import precision_dtype
from fine_tune.modules.weights import load_weights
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit


def prepared(args: list[str], folder: Path, tmp_path: Path, *more: str) -> PreparedCLI:
    where = ["--model.model_name_or_path", str(folder)]
    root = ["--trainer.default_root_dir", str(tmp_path)]
    run = prepare_as_fit([*args, *where, *root, *more])
    run.datamodule.setup("fit")
    return run


def parts_of(parameters: Any) -> list[Tensor]:
    """The tensors of parameters, those that a quantized one keeps beside its weights included."""
    found = []
    for parameter in parameters:
        found.append(parameter.data)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            second = state.state2
            found += [state.absmax, state.code, state.offset, second.absmax, second.code]
    return found


def taken(run: PreparedCLI, way: Way, batch: Any, rows: int, precision: str) -> dict[str, int]:
    """Take the step for real, and count."""
    torch.manual_seed(0)
    module: Any = run.model
    module.model = model = load_weights(way.settings, run.datamodule.tokenizer, precision)
    micro_batch = module.take_rows(batch, slice(0, rows))
    live = LiveBytes([*model.parameters(), *model.buffers()], lambda _: "all")
    dtype = precision_dtype(precision)
    trained = [p for p in model.parameters() if p.requires_grad]
    with live:
        for _ in range(2):
            live.start_peak()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = module.loss_sums(micro_batch)[0]
            loss.backward()
            del loss
    gradients = sum(p.grad.nbytes for p in trained)
    optimizer = build_optimizer(module.optimizer, model.named_parameters(), None)
    optimizer.step()
    state = [v for of in optimizer.state.values() for v in of.values() if isinstance(v, Tensor)]
    return {
        "weights": sum(t.nbytes for t in parts_of(model.parameters()))
        + bytes_held(model.buffers()),
        "gradients": gradients,
        "optimizer": bytes_held(state),
        "working": live.at_peak["all"] - gradients,
    }


@pytest.mark.parametrize("words", [5, 40])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_plan_is_what_a_step_takes(
    fit_args: list[str], tmp_path: Path, architecture: str, precision: str, words: int
) -> None:
    rows = [{"question": f"Berapa {i}?", "answer": "12 " * words} for i in range(40)]
    write_rows(tmp_path / "long.jsonl", rows)
    folder = save_model(architecture, tmp_path / architecture)
    more = ["--data.path", str(tmp_path / "long.jsonl")]
    run = prepared(fit_args, folder, tmp_path, *more, "--trainer.precision", precision)
    batch = run.datamodule.longest_rows("train")
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, precision)
    ways = ways_to_train(run.model.model_settings, planner.config)
    assert [way.name for way in ways] == ["all weights"] * 2 + ["LoRA"] * 2 + ["QLoRA"] * 2
    for way in ways:
        planned: StepMemory = planner.at_once(way.settings, batch, 4)
        real = taken(run, way, batch, 4, precision)
        for term in ("gradients", "optimizer"):
            assert getattr(planned, term) == real[term], (way, term)
        assert planned.weights == real["weights"], way.name
        working = planned.activations + planned.logits + planned.attention
        assert working == pytest.approx(real["working"], rel=0.1), way


def test_a_mixture_of_experts_is_planned(fit_args: list[str], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    save_small_model(tmp_path / "moe", "qwen3_moe", head_dim=8, norm_topk_prob=False, **experts)
    run = prepared(fit_args, tmp_path / "moe", tmp_path)
    batch = run.datamodule.longest_rows("train")
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, "32-true")
    way = ways_to_train(run.model.model_settings, planner.config)[0]
    planned, real = planner.at_once(way.settings, batch, 4), taken(run, way, batch, 4, "32-true")
    assert planned.weights == real["weights"]
    assert planned.gradients == real["gradients"]
    assert planned.optimizer == real["optimizer"]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdamW"])
def test_the_state_of_bitsandbytes_optimizers_is_planned(
    fit_args: list[str], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "wide"
    save_small_model(folder, hidden_size=128, num_hidden_layers=1, intermediate_size=1024)
    optimizer = ["--model.optimizer", f"bitsandbytes.optim.{name}", "--model.optimizer.lr", "1e-3"]
    run = prepared(fit_args, folder, tmp_path, *optimizer)
    batch = run.datamodule.longest_rows("train")
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, "32-true")
    for way in ways_to_train(run.model.model_settings, planner.config)[::2]:
        planned = planner.at_once(way.settings, batch, 4)
        assert planned.optimizer == taken(run, way, batch, 4, "32-true")["optimizer"], way


@pytest.mark.slow
def test_a_deep_model_is_planned_from_shallow_ones(fit_args: list[str], tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    save_small_model(deep, **{**SIZES, "num_hidden_layers": 12})
    run = prepared(fit_args, deep, tmp_path)
    batch = run.datamodule.longest_rows("train")
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, "32-true")
    for way in ways_to_train(run.model.model_settings, planner.config):
        planned = planner.at_once(way.settings, batch, 4)
        whole = planner._working(
            planner.config, way.settings, run.model.take_rows(batch, slice(0, 4)), True
        )
        working = planned.activations + planned.logits + planned.attention
        assert working == pytest.approx(whole.total(), rel=0.03), way


def test_plan_prints_what_fits_and_the_flags_fit(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--trainer.default_root_dir", str(tmp_path)]
    roomy = command_line("plan", *args, "--gpu_memory_gib", "0.6", "--tokens_per_second", "100")
    assert roomy.code == 0, roomy.err
    assert "s of training at 100 tokens/s" in roomy.out and "assumed for a GPU" in roomy.out
    flags = [
        line.split("at once")[1].split() for line in roomy.out.splitlines() if "at once  " in line
    ]
    assert len(flags) == 6
    fitted = command_line("fit", *fit_args, *flags[0])
    assert fitted.code == 0, fitted.err
    tight = command_line("plan", *args, "--gpu_memory_gib", "0.5", "--like", fitted.run().path)
    assert "nothing: one row of" in tight.out and "of training at " in tight.out
    (fitted.run().path / "metrics.csv").unlink()
    no_speed = command_line("plan", *args, "--like", fitted.run().path)
    assert no_speed.code == 2 and "has no perf/tokens_per_second" in no_speed.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--gpu_memory_gib", "0"], "gpu_memory_gib: must be above 0 and finite, got 0.0"),
        (["--tokens_per_second", "inf"], "tokens_per_second: must be above 0"),
        (["--like", "nobody"], "run: "),
    ],
)
def test_plan_refuses_what_makes_no_sense(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, more: list[str], told: str
) -> None:
    refused = command_line("plan", *fit_args, "--trainer.default_root_dir", str(tmp_path), *more)
    assert refused.code == 2 and told in refused.err


class Device(HostMemory):
    """A device of a chosen size with nothing on it."""

    def __init__(self, gib: float) -> None:
        super().__init__()
        self.gib = gib

    def total(self) -> int:
        return int(self.gib * 2**30)

    def used(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("gib", "recomputed", "rows"),
    [(1.0, False, 8), (0.0026, False, 4), (0.0019, True, 1), (0.0015, True, 1)],
)
def test_auto_takes_as_many_rows_as_fit_and_recomputes_only_where_it_must(
    command_line: CommandLine,
    fit_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    gib: float,
    recomputed: bool,
    rows: int,
) -> None:
    monkeypatch.setattr("fine_tune.memory_choices.memory_of", lambda _: Device(gib))
    auto = ["--data.max_tokens_per_micro_batch", "auto", "--model.gradient_checkpointing", "auto"]
    outcome = command_line("fit", *fit_args, *auto)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((outcome.run().path / "config.yaml").read_text())
    assert config["model"]["init_args"]["gradient_checkpointing"] is recomputed
    assert config["data"]["init_args"]["max_tokens_per_micro_batch"] == 24 * rows
    assert "data.max_tokens_per_micro_batch: " in outcome.out
    again = command_line("fit", *fit_args, "--name", "plain")
    assert outcome.metrics()[-1]["val/loss"] == pytest.approx(
        again.metrics("plain")[-1]["val/loss"]
    )


def test_auto_leaves_a_budget_of_ones_own(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fine_tune.memory_choices.memory_of", lambda _: Device(1.0))
    own = ["--data.max_tokens_per_micro_batch", "48", "--model.gradient_checkpointing", "auto"]
    outcome = command_line("fit", *fit_args, *own)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((outcome.run().path / "config.yaml").read_text())
    assert config["data"]["init_args"]["max_tokens_per_micro_batch"] == 48
    assert config["model"]["init_args"]["gradient_checkpointing"] is False


def test_a_cpu_takes_fewer_tokens_at_a_time_where_the_model_chooses_from_many(
    fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--trainer.accelerator", "cpu", "--data.cache_dir", str(tmp_path / "cache")]
    new = ["--model.tokenizer", str(TOKENIZER), "--model.model_name_or_path", "null"]
    config = "{model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1"
    few = prepare_as_fit([*args, *new, "--model.from_config", config + "}"])
    many = prepare_as_fit([*args, *new, "--model.from_config", config + ", vocab_size: 100000}"])
    assert (
        few.plan.max_tokens_per_micro_batch == 1024
    )  # 8 rows of 128; the tokenizer has 1,500 words
    assert many.plan.max_tokens_per_micro_batch == 512
