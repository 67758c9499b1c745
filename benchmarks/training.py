"""Training rows: ours beside TRL and transformers.Trainer, parity first, then by turns.

Ours runs by its command line and its defaults. The peer runs with its defaults, and at its best: no gradient
checkpointing, rows grouped by length, and what a search of its other settings found fastest.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.gpu import say_rates
from benchmarks.harness import Bench, Clock, Measured, by_turns, told
from benchmarks.inputs import LORA, SEED, Length, save_model, write_rows

RATE = 1e-4
GATE_STEPS, GATE_ROWS, GATE_DIFFERENCE = 20, 2, 1e-5
SEARCH_STEPS = 4
OUR_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "bf16 base": "bf16-mixed"}


@dataclass(frozen=True)
class Row:
    """A row of the design's tables: what is trained, on what, and what is wanted.

    Args:
        task: SFT, DPO, or Pretrain: all rows of one length, the peer compiled.
        config: The model's.
        prompt: Its tokens.
        answer: The same of an answer.
        batch_size: Rows or pairs per optimizer step.
        steps: Optimizer steps of an epoch.
        epochs: Passes over the rows.
        pairs: Legs of each side.
        lora: Whether an adapter is trained, on all linear layers.
        quantization: nf4, or none.
        device: cpu or cuda.
        warmup: Steps at the start that are not counted.
        targets: By peer: what a release needs of the ratio, and what is aimed at.
        rate: Tokens per second that are wanted of ours on one H200.
    """

    task: Literal["SFT", "DPO", "Pretrain"]
    config: dict[str, Any]
    prompt: Length
    answer: Length
    batch_size: int
    steps: int = 20
    epochs: int = 1
    pairs: int = 5
    lora: bool = False
    quantization: str | None = None
    device: str = "cpu"
    warmup: int = 0
    targets: dict[str, tuple[float, float]] = field(default_factory=dict)
    rate: float | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The fields of a row's answers."""
        return {"SFT": ("completion",), "DPO": ("chosen", "rejected"), "Pretrain": ()}[self.task]

    @property
    def length(self) -> int:
        """Tokens of a row of texts: the text between two stop tokens."""
        return self.prompt.mean + 2


@dataclass(frozen=True)
class Leg:
    """One run of one side.

    Args:
        row: What is trained.
        root: Where the model is.
        folder: Where it works and caches.
        rows: The file.
        precision: fp32; bf16, autocast over float32 weights; bf16 base, frozen weights in bfloat16 too.
        peer: The peer's settings; None for its defaults.
        gate: Whether it is the parity run: small steps, the file's order for the peer, a loss per step.
        beta: Of DPO.
        more: Of our command line.
    """

    row: Row
    root: str
    folder: str
    rows: str
    precision: str = "fp32"
    peer: dict[str, Any] | None = None
    gate: bool = False
    beta: float = 0.1
    more: str = ""

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Leg":
        """Return a leg from JSON."""
        row = given["row"]
        lengths = {name: Length(**row[name]) for name in ("prompt", "answer")}
        return cls(**{**given, "row": Row(**{**row, **lengths})})

    @property
    def model(self) -> str:
        """The model's folder."""
        return f"{self.root}/{'gate_model' if self.gate else 'model'}"

    @property
    def num_steps(self) -> int:
        """Optimizer steps it takes."""
        return GATE_STEPS if self.gate else self.row.steps * self.row.epochs

    def clock(self) -> Clock:
        """Return the clock of the run."""
        return Clock(self.num_steps, 0 if self.gate else self.row.warmup)

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step."""
        return GATE_ROWS if self.gate else self.row.batch_size


# ---- legs


def run_ours(**given: Any) -> Measured:
    """Train with this project's command line."""
    from peft import set_peft_model_state_dict

    from fine_tune import modules
    from fine_tune.__main__ import main as fine_tune
    from fine_tune.callbacks import vram_guard
    from fine_tune.data.step_data import StepData

    leg = Leg.of(given)
    module: Any = getattr(modules, leg.row.task)
    if leg.row.lora and leg.gate:
        configure_model = module.configure_model

        def with_adapter(self: Any) -> None:
            configure_model(self)
            set_peft_model_state_dict(self.model, adapter_of(leg))

        module.configure_model = with_adapter
    clock = leg.clock()
    clock.watch(StepData, "prepare_data", "tokenization")
    if leg.row.task == "DPO":
        clock.watch(module, "on_fit_start", "reference")
    clock.watch(vram_guard, "rehearse", "rehearsal")
    clock.watch(module, "on_train_start", "begin")  # after that of the callbacks
    clock.watch(module, "optimizer_step", "step")
    code = fine_tune(our_line(leg))
    assert code == 0, f"exit code {code}"
    with open(next(Path(leg.folder).glob("lightning_logs/*/version_*/metrics.csv"))) as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    return clock.measured(losses=losses, settings=None)


def our_line(leg: Leg) -> list[str]:
    """Return our command line: what the task asks for, and the defaults."""
    row = leg.row
    data = {"SFT": "SFTData", "DPO": "PreferenceData", "Pretrain": "TextData"}[row.task]
    line = f"""
        fit --trainer.default_root_dir={leg.folder} --trainer.accelerator={row.device} --trainer.devices=1
        --trainer.precision={OUR_PRECISIONS[leg.precision]} --trainer.gradient_clip_val=1.0
        --trainer.log_every_n_steps={1 if leg.gate else 10}
        --model=fine_tune.modules.{row.task} --model.model_name_or_path={leg.model}
        --model.optimizer=torch.optim.AdamW --model.optimizer.lr={RATE} --model.optimizer.weight_decay=0
        --data=fine_tune.data.{data} --data.path={leg.rows} --data.split=none
        --data.epochs={row.epochs} --data.batch_size={leg.batch_size} --data.seed={SEED}
        --data.cache_dir={leg.folder}/cache --checkpoint.every=1000000""".split()
    if row.task == "DPO":
        line += [f"--model.beta={leg.beta}"]
    if row.task == "Pretrain":
        line += ["--data.field=prompt", f"--data.max_length={row.length}"]
    if row.lora:
        line += [f"--model.lora.{key}={value}" for key, value in LORA.items()]
        line += ["--model.lora.target_modules=all-linear"]
    if row.quantization:
        line += [f"--model.quantization={row.quantization}"]
    return line + leg.more.split()


def adapter_of(leg: Leg) -> dict[str, Any]:
    """Return the adapter that both sides of the gate begin with."""
    import torch

    return torch.load(f"{leg.model}/adapter.pt")


def peer_arguments(leg: Leg) -> dict[str, Any]:
    """Return what every peer's arguments class is given; the rest of them stay as they are."""
    given: dict[str, Any] = {"output_dir": f"{leg.folder}/peer-{leg.beta}", "report_to": "none"}
    given |= {"learning_rate": RATE, "num_train_epochs": leg.row.epochs, "disable_tqdm": True}
    given |= {"per_device_train_batch_size": leg.batch_size, "use_cpu": leg.row.device == "cpu"}
    given |= {"weight_decay": 0.0, "max_grad_norm": 1.0}
    if leg.peer is not None:
        peer = leg.peer
        given |= {"gradient_checkpointing": False, "bf16": peer["precision"] != "fp32"}
        given |= {"train_sampling_strategy": "group_by_length"}
        given |= {"per_device_train_batch_size": peer["at_once"]}
        given |= {"gradient_accumulation_steps": leg.batch_size // peer["at_once"]}
        given |= {"dataloader_num_workers": peer["workers"]}
        given |= {"torch_compile": leg.row.task == "Pretrain" and not leg.gate}
    if leg.gate:
        given |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine"}
        given |= {"per_device_train_batch_size": leg.batch_size, "gradient_accumulation_steps": 1}
        given |= {"logging_steps": 1, "gradient_checkpointing": False, "bf16": False}
    return given


def lora_config(leg: Leg) -> Any:
    """Return the adapter's config, or None."""
    from peft import LoraConfig

    if not leg.row.lora:
        return None
    return LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")


def model_arguments(leg: Leg) -> dict[str, Any]:
    """Return how the peer's frozen weights are loaded, where that is not as saved."""
    if leg.row.quantization:
        from transformers import BitsAndBytesConfig

        kind = leg.row.quantization
        return {
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
        }
    if leg.peer is not None and leg.peer["precision"] == "bf16 base":
        return {"dtype": "bfloat16"}
    return {}


def used_settings(trainer: Any) -> str:
    """Say what a peer's trainer really used."""
    used = {"model": str(trainer.model.dtype).removeprefix("torch.")}
    names = ["bf16", "gradient_checkpointing", "precompute_ref_log_probs", "max_length", "optim"]
    names += ["train_sampling_strategy", "per_device_train_batch_size"]
    names += ["gradient_accumulation_steps", "dataloader_num_workers"]
    used |= {name: getattr(trainer.args, name) for name in names if hasattr(trainer.args, name)}
    return ", ".join(f"{name} {getattr(value, 'value', value)}" for name, value in used.items())


def peer_losses(trainer: Any) -> list[float]:
    """Return the losses a peer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- sides, side by side


class TrainingBench(Bench):
    """A training row's model, rows and sides.

    Args:
        name: C1 ...
        row: The row.
        results: Where the peer's best setting and the results are kept.
        root: An empty folder.
        threads: Of each leg.
    """

    def __init__(self, name: str, row: Row, results: Path, root: Path, threads: int = 2) -> None:
        super().__init__(name, results, root, row.device, threads)
        self.row = row
        dtype = "float32" if row.device == "cpu" else "bfloat16"
        described, self.num_weights = save_model(root / "model", row.config, dtype)
        trained = f"LoRA r {LORA['r']} on all linear layers" if row.lora else "all weights"
        self.say(
            f"{described}, trained: {trained}{f', {row.quantization}' * bool(row.quantization)}"
        )
        written = self.write("rows.jsonl", row.steps * row.batch_size)
        self.tokens = written["tokens"] * row.epochs  # that are counted
        self.tokens -= self.tokens * row.warmup // (row.steps * row.epochs)
        self.say(
            f"{row.steps * row.batch_size} rows, {row.batch_size} a step, epochs {row.epochs}; {written['told']}"
        )

    def write(self, name: str, count: int) -> dict[str, Any]:
        """Write rows of the row's kind."""
        row = self.row
        return write_rows(self.root / name, count, row.prompt, row.answer, row.answers)

    def train(self, side: str, folder: Path | None = None, **fields: Any) -> Measured:
        """Run a training leg: of ours, or of ``TRL`` or ``Trainer``."""
        of_task = "benchmarks.dpo" if self.row.task == "DPO" else "benchmarks.sft"
        function = (
            "benchmarks.training:run_ours" if side == "ours" else f"{of_task}:run_{side.lower()}"
        )
        rows = fields.pop("rows", "rows.jsonl")
        row = fields.pop("row", self.row)
        leg = Leg(
            row, str(self.root), str(folder or self.folder()), str(self.root / rows), **fields
        )
        return self.leg(function, **asdict(leg))

    def gate(self, peers: tuple[str, ...]) -> None:
        """End here unless all sides give the same losses: 20 steps of 2 rows, fp32, the same order.

        On a GPU the gate's model has two layers of the row's.
        """
        from fine_tune.data.steps import epoch_order

        config = self.row.config
        if self.row.device == "cuda":
            config = {**config, "num_hidden_layers": 2}
        save_model(self.root / "gate_model", config)
        count = GATE_STEPS * GATE_ROWS
        self.write("gate.jsonl", count)
        lines = (self.root / "gate.jsonl").read_text().splitlines(keepends=True)
        order = epoch_order(np.ones(count), SEED, 0)
        (self.root / "gate_peer.jsonl").write_text("".join(lines[i] for i in order))
        row = replace(self.row, epochs=1, quantization=None)
        ours = self.train("ours", rows="gate.jsonl", gate=True, row=row)["losses"]
        for peer in peers:
            setting = {"at_once": GATE_ROWS, "precision": "fp32", "workers": 0, "precompute": False}
            leg = self.train(peer, rows="gate_peer.jsonl", gate=True, row=row, peer=setting)
            theirs = leg["losses"]
            worst = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
            shown = ", ".join(f"{loss:.4f}" for loss in ours[:3])
            self.say(
                f"parity with {peer}: {GATE_STEPS} steps of {GATE_ROWS} rows, fp32, losses {shown}: "
                f"at most {worst:.1e} apart, relative (must: {GATE_DIFFERENCE:.0e})"
            )
            if worst > GATE_DIFFERENCE or len(ours) != GATE_STEPS:
                raise SystemExit("no parity, no ratio")

    def best_peer(self, again: bool, peers: tuple[str, ...]) -> dict[str, Any]:
        """Return the fastest of the peers' settings, by short legs."""
        row = self.row
        at_once = [n for n in (8, 16, 4, 2, 1) if n <= row.batch_size]
        precisions = ["fp32", "bf16"] if row.device == "cpu" else ["bf16"]
        # where all weights are trained, 16-bit weights are another training
        precisions += ["bf16 base"] * row.lora
        choices: dict[str, tuple[Any, ...]] = {
            "at_once": tuple(at_once),
            "precision": tuple(precisions),
            "peer": peers,
            "workers": (0, 1, 2),
        }
        if row.task == "DPO":
            choices["precompute"] = (False, True)
        steps = min(row.steps, SEARCH_STEPS + row.warmup)
        self.write("search.jsonl", steps * row.batch_size)

        def seconds(setting: dict[str, Any]) -> float:
            others = {**setting}
            short = replace(row, steps=steps)
            leg = self.train(others.pop("peer"), rows="search.jsonl", row=short, peer=others)
            return counted(leg)

        return self.best(choices, seconds, again)

    def sides(self, best: dict[str, Any], more: str) -> dict[str, dict[str, Any]]:
        """Return what runs by turns: ours also in the precision of the peer's best, where that is another."""
        best = {**best}
        peer = best.pop("peer")
        sides: dict[str, dict[str, Any]] = {f"{peer} best": {"side": peer, "peer": best}}
        if "defaults" in self.row.targets:
            sides["TRL defaults"] = {"side": "TRL"}
        first = "fp32" if self.row.device == "cpu" else "bf16"
        for precision in dict.fromkeys((first, best["precision"])):
            ours = {"side": "ours", "precision": precision, "more": more}
            sides.setdefault(f"ours {OUR_PRECISIONS[precision]}", ours)
            if self.row.task == "Pretrain":
                compiled = {**ours, "more": f"{more} --model.compile=true"}
                sides.setdefault(f"ours {OUR_PRECISIONS[precision]} compiled", compiled)
        return sides

    def pairs_of(
        self, sides: dict[str, dict[str, Any]], pairs: int
    ) -> Iterator[tuple[str, Measured]]:
        """Run the sides by turns, and say what each leg took."""
        for pair, name in by_turns(list(sides), pairs):
            leg = self.train(**sides[name])
            assert leg["num_steps"] == self.row.steps * self.row.epochs, leg
            if leg["settings"] and pair == 0:
                self.say(f"{name}: {leg['settings']}")
            self.say(
                f"pair {pair}, {name}: {self.tokens / counted(leg):,.0f} tokens/s; {told(leg)}"
            )
            yield name, leg


def compare_rates(bench: TrainingBench, sides: dict[str, dict[str, Any]], pairs: int) -> None:
    """Tokens per second from the reference, where there is one, to the last step; and the peak of memory."""
    rates: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    memory = "peak_rss_gib" if bench.row.device == "cpu" else "peak_gpu_gib"
    for name, leg in bench.pairs_of(sides, pairs):
        rates[name].append(bench.tokens / counted(leg))
        peaks[name].append(leg[memory])
        if "rehearsal" in leg["seconds"]:
            seconds = counted(leg) + leg["seconds"]["rehearsal"]
            rates[f"{name}, rehearsal counted"].append(bench.tokens / seconds)
    if bench.row.rate is not None or bench.row.device == "cuda":
        say_rates(bench, rates)
    theirs = {name: "defaults" if "defaults" in name else "best" for name in sides}
    for name, kind in theirs.items():
        if name.startswith("ours") or kind not in bench.row.targets:
            continue
        must, aim = bench.row.targets[kind]
        for ours in (name for name in rates if name.startswith("ours")):
            targets = f"must: at least {must}, aim: {aim}"
            bench.ratio(f"tokens/s, {ours} / {name}", rates[ours], rates[name], targets)
        if "memory" in bench.row.targets:
            must, aim = bench.row.targets["memory"]
            for ours in (name for name in peaks if name.startswith("ours")):
                targets = f"must: at most {must}, aim: {aim}" if kind == "best" else "no target"
                bench.ratio(f"peak memory, {ours} / {name}", peaks[ours], peaks[name], targets)


def counted(measured: Measured) -> float:
    """Return the seconds from the reference to the end of the last step, without what lies between."""
    seconds = measured["seconds"]
    return float(seconds.get("reference", 0.0) + seconds["steps"])
