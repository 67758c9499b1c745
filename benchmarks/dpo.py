"""DPO beside TRL's DPOTrainer, by turns, each leg in a process of its own: C3 and C4 of the design.

C3: LoRA on all linear layers, one epoch: pairs per second from the reference to the end of the last step, against TRL's
defaults and TRL's best. C4: all weights, three epochs, then again with another beta: seconds of both runs together, and
of the second run's reference stage. Ours runs by its command line and its defaults, its rehearsal before step 1
counted in C4 and told apart in C3. TRL's best setting is searched once by short legs and kept beside the results.

First a gate: 20 steps of 2 pairs, fp32, same model, rows and order (LoRA: same new adapter). Losses that differ by more
than 1e-5 relative end it: no parity, no ratio. Imports are before all clocks; tokenization is not in pairs per second.

    python benchmarks/dpo.py C3 [--pairs 5] [--steps 20] [--search]
    python benchmarks/dpo.py C4 [--pairs 5] [--steps 6] [--search]
"""

import argparse
import contextlib
import csv
import functools
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "peft", "lightning", "accelerate", "datasets")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
SEED, RATE, BETAS = 42, 1e-4, (0.1, 0.3)
GATE_STEPS, GATE_PAIRS, GATE_DIFFERENCE = 20, 2, 1e-5
SEARCH_STEPS = 4  # at most, of an epoch
OUR_NAMES = {"fp32": "32-true", "bf16": "bf16-mixed", "bf16 base": "bf16-mixed"}

Measured = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the design's table: the model, how it is trained, and how often."""

    layers: int
    width: int
    vocabulary: int
    lora: bool
    epochs: int
    batch_size: int  # pairs of rows per step
    steps: int  # of an epoch
    pairs: int  # of legs


@dataclass(frozen=True)
class Peer:
    """What is searched of TRL's settings; all have gradient checkpointing off, rows grouped by length, no length limit.

    ``bf16`` is autocast over float32 weights; ``bf16 base`` has frozen weights in bfloat16 too.
    """

    at_once: int = 2  # pairs per forward pass; the rest of the step is accumulated
    precision: str = "fp32"
    precompute: bool = False
    workers: int = 0


@dataclass(frozen=True)
class Leg:
    """One run of one side."""

    side: str
    root: str  # the model, the rows, the adapter
    folder: str  # where it works and caches
    rows: str
    lora: bool
    epochs: int
    batch_size: int
    beta: float = BETAS[0]
    precision: str = "fp32"  # ours
    peer: dict[str, Any] | None = None  # None: TRL's defaults
    gate: bool = False
    more: str = ""  # of our command line


# C4's vocabulary is small: TRL's head runs at every position on a CPU, and a pair of legs would take half an hour.
ROWS = {
    "C3": Row(12, 384, 32_000, lora=True, epochs=1, batch_size=4, steps=20, pairs=5),
    "C4": Row(6, 256, 4_096, lora=False, epochs=3, batch_size=8, steps=6, pairs=5),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "at_once": (8, 4, 2, 1),
    "precision": ("fp32", "bf16", "bf16 base"),
    "precompute": (False, True),
    "workers": (0, 1, 2),
}


# ---- one leg, in its own process


class Clock:
    """Beginnings and ends of the calls of some functions, by name."""

    def __init__(self) -> None:
        self.imports = time.time() - psutil.Process().create_time()
        self.start = time.perf_counter()
        self.calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Note all calls of a function of a class or module."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.calls[name].append((start, time.perf_counter()))

        setattr(owner, function, call)

    def measured(self, losses: list[float], settings: Any = None) -> Measured:
        """Return the seconds of each name, of the steps (from ``begin`` on), and since the imports."""
        total, calls = time.perf_counter() - self.start, dict(self.calls)
        ends = [end for _, end in calls.pop("step")]
        begin = calls.pop("begin")[-1][1]
        seconds = {name: sum(b - a for a, b in spans) for name, spans in calls.items()}
        seconds |= {"imports": self.imports, "steps": ends[-1] - begin, "total": total}
        told = {"seconds": seconds, "num_steps": len(ends), "losses": losses}
        return told | {"settings": settings}


def run_ours(leg: Leg) -> Measured:
    """Train with this project's command line."""
    import torch
    from peft import set_peft_model_state_dict

    from fine_tune.__main__ import main as fine_tune_main
    from fine_tune.callbacks import vram_guard
    from fine_tune.data.step_data import StepData
    from fine_tune.modules import DPO

    line = f"""
        fit --trainer.default_root_dir={leg.folder} --trainer.accelerator=cpu --trainer.gradient_clip_val=1.0
        --trainer.precision={OUR_NAMES[leg.precision]} --trainer.log_every_n_steps={1 if leg.gate else 10}
        --model=fine_tune.modules.DPO --model.model_name_or_path={leg.root}/model --model.beta={leg.beta}
        --model.optimizer=torch.optim.AdamW --model.optimizer.lr={RATE} --model.optimizer.weight_decay=0
        --data=fine_tune.data.PreferenceData --data.path={leg.rows} --data.split=none --data.epochs={leg.epochs}
        --data.batch_size={leg.batch_size} --data.seed={SEED}
        --data.cache_dir={leg.folder}/cache --checkpoint.every=1000000""".split()  # once, at the end, like the peer
    if leg.lora:
        line += [f"--model.lora.{key}={value}" for key, value in LORA.items()]
        line += ["--model.lora.target_modules=all-linear"]
    line += leg.more.split()
    if leg.lora and leg.gate:
        configure_model = DPO.configure_model

        def with_adapter(module: Any) -> None:
            configure_model(module)
            set_peft_model_state_dict(module.model, torch.load(f"{leg.root}/adapter.pt"))

        DPO.configure_model = with_adapter  # type: ignore[method-assign]
    clock = Clock()
    clock.watch(StepData, "prepare_data", "tokenization")
    clock.watch(DPO, "on_fit_start", "reference")
    clock.watch(vram_guard, "rehearse", "rehearsal")
    clock.watch(DPO, "on_train_start", "begin")  # after that of the callbacks
    clock.watch(DPO, "optimizer_step", "step")
    code = fine_tune_main(line)
    assert code == 0, f"exit code {code}"
    with open(next(Path(leg.folder).glob("lightning_logs/*/version_*/metrics.csv"))) as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    return clock.measured(losses)


def peer_settings(leg: Leg) -> dict[str, Any]:
    """Return what a DPOConfig is given."""
    given: dict[str, Any] = {"output_dir": f"{leg.folder}/trl-{leg.beta}", "beta": leg.beta}
    given |= {"learning_rate": RATE, "num_train_epochs": leg.epochs, "report_to": "none"}
    given |= {"per_device_train_batch_size": leg.batch_size, "use_cpu": True}
    if leg.peer is not None:
        peer = Peer(**leg.peer)
        given |= {"gradient_checkpointing": False, "bf16": peer.precision != "fp32"}
        given |= {"precompute_ref_log_probs": peer.precompute}
        given |= {"train_sampling_strategy": "group_by_length"}
        given |= {"remove_unused_columns": False}  # else its sampler does not find the lengths
        given |= {"per_device_train_batch_size": peer.at_once}
        given |= {"gradient_accumulation_steps": leg.batch_size // peer.at_once}
        given |= {"dataloader_num_workers": peer.workers}
        given |= {"max_length": None}  # a limit would key its reference by beta and output folder
        if peer.precision == "bf16 base":
            given["model_init_kwargs"] = {"dtype": "bfloat16"}
    if leg.gate:
        given |= {"train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine"}
        given |= {"per_device_train_batch_size": leg.batch_size, "gradient_accumulation_steps": 1}
        given |= {"logging_steps": 1, "max_grad_norm": 1.0}
    return given


def run_peer(leg: Leg) -> Measured:
    """Train with TRL's DPOTrainer."""
    import datasets
    import torch
    import trl.trainer.dpo_trainer
    from peft import LoraConfig, set_peft_model_state_dict
    from transformers import AutoTokenizer
    from transformers.trainer_callback import CallbackHandler
    from trl import DPOConfig, DPOTrainer

    if leg.gate:
        _sum_in_float64(trl.trainer.utils)
    clock = Clock()
    clock.watch(datasets, "load_dataset", "tokenization")
    clock.watch(DPOTrainer, "_prepare_dataset", "tokenization")
    clock.watch(DPOTrainer, "_precompute_ref_logps", "reference")
    clock.watch(trl.trainer.dpo_trainer, "hash_module", "reference")
    clock.watch(CallbackHandler, "on_train_begin", "begin")
    clock.watch(CallbackHandler, "on_step_end", "step")
    lora = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    cache = f"{leg.folder}/cache"
    trainer = DPOTrainer(
        f"{leg.root}/model",
        args=DPOConfig(**peer_settings(leg)),
        train_dataset=datasets.load_dataset("json", data_files=leg.rows, cache_dir=cache)["train"],
        processing_class=AutoTokenizer.from_pretrained(f"{leg.root}/model"),
        peft_config=lora if leg.lora else None,
    )
    if leg.lora and leg.gate:
        set_peft_model_state_dict(trainer.model, torch.load(f"{leg.root}/adapter.pt"))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    used = {name: getattr(trainer.args, name) for name in ("bf16", "gradient_checkpointing")}
    used["model"] = str(trainer.model.dtype).removeprefix("torch.")
    names = ["precompute_ref_log_probs", "train_sampling_strategy", "per_device_train_batch_size"]
    names += ["gradient_accumulation_steps", "dataloader_num_workers", "max_length", "optim"]
    used |= {name: getattr(trainer.args, name) for name in names}
    shown = (f"{name} {getattr(value, 'value', value)}" for name, value in used.items())
    return clock.measured(losses, ", ".join(shown))


def _sum_in_float64(utils: Any) -> None:
    """Let TRL add up log-probabilities as ours does: float32 sums of several hundred differ by more than the gate."""
    head = utils._ChunkedLogProbFunction

    class Wide:
        @staticmethod
        def apply(*given: Any) -> tuple[Any, ...]:
            logps, *others = head.apply(*given)
            return logps.double(), *others

    utils._ChunkedLogProbFunction = Wide


def run_leg(leg: Leg) -> Measured:
    """Run one leg in this process; what the first process of its side imports, later ones have before the clock."""
    imports = Path(leg.root, f"{leg.side}.imports")
    for module in imports.read_text().split() if imports.exists() else []:
        with contextlib.suppress(ImportError):  # made at run time, not by an import
            importlib.import_module(module)
    measured = (run_ours if leg.side == "ours" else run_peer)(leg)
    if not imports.exists():
        imports.write_text("\n".join(sorted(sys.modules)))
    return measured


# ---- legs, side by side


class Bench:
    """A row's model and rows, its legs, and what is said of them.

    Args:
        name: C3 or C4.
        steps: Of an epoch.
        threads: Of each leg.
        results: Where the peer's best setting and the results are kept.
        root: An empty folder.
    """

    def __init__(self, name: str, steps: int, threads: int, results: Path, root: Path) -> None:
        self.name, self.row, self.steps, self.threads = name, ROWS[name], steps, threads
        self.results, self.root, self.num_folders = results, root, 0
        versions = [f"{package} {metadata.version(package)}" for package in PACKAGES]
        self.on = [cpu_model(), f"{threads} threads", f"python {sys.version.split()[0]}", *versions]
        self.lines: list[str] = []
        self.say(", ".join(self.on))
        trained = f"LoRA r {LORA['r']} on all linear layers" if self.row.lora else "all weights"
        self.say(f"{save_model(self.row, root)}, trained: {trained}")
        size = self.row.batch_size
        tokens = write_rows(root / "rows.jsonl", steps * size)
        pairs = f"{steps * size} pairs, {size} a step"
        self.say(f"{pairs}, epochs {self.row.epochs}; {tokens}")

    def say(self, line: str) -> None:
        """Print a line, and keep it for the results."""
        print(line, flush=True)
        self.lines.append(line)

    def folder(self) -> Path:
        """Make a folder, for one leg or for those that share a cache."""
        self.num_folders += 1
        folder = self.root / f"legs{self.num_folders}"
        folder.mkdir()
        return folder

    def leg(self, folder: Path, rows: str = "rows.jsonl", **fields: Any) -> Measured:
        """Run a leg in a process of its own."""
        shared = {"root": str(self.root), "folder": str(folder), "rows": str(self.root / rows)}
        of_row = {
            "epochs": self.row.epochs,
            "lora": self.row.lora,
            "batch_size": self.row.batch_size,
        }
        fields = {**of_row, **shared, **fields}
        command = [sys.executable, __file__, "--leg", json.dumps(asdict(Leg(**fields)))]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=env)
        if ended.returncode:
            sys.exit(f"{fields} failed:\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
        return json.loads(ended.stdout.splitlines()[-1])

    def gate(self) -> None:
        """End here unless both sides give the same losses."""
        from fine_tune.data.steps import epoch_order

        count = GATE_STEPS * GATE_PAIRS
        write_rows(self.root / "gate.jsonl", count)
        lines = (self.root / "gate.jsonl").read_text().splitlines(keepends=True)
        order = epoch_order(np.ones(count), SEED, 0)
        (self.root / "gate_peer.jsonl").write_text("".join(lines[i] for i in order))
        theirs, ours = (
            self.leg(
                self.folder(),
                rows,
                side=side,
                peer=asdict(Peer()),
                gate=True,
                epochs=1,
                batch_size=GATE_PAIRS,
            )
            for side, rows in (("peer", "gate_peer.jsonl"), ("ours", "gate.jsonl"))
        )
        losses = list(zip(ours["losses"], theirs["losses"], strict=True))
        worst = max(abs(a - b) / abs(b) for a, b in losses)
        shown = ", ".join(f"{theirs['losses'][i]:.4f}" for i in (0, GATE_STEPS // 2, -1))
        self.say(
            f"parity: {len(losses)} steps of {GATE_PAIRS} pairs, fp32, losses {shown}: at most {worst:.1e} apart, "
            f"relative (must: {GATE_DIFFERENCE:.0e})"
        )
        if worst > GATE_DIFFERENCE or len(losses) != GATE_STEPS:
            sys.exit("no parity, no ratio")

    def best_peer(self, again: bool) -> Peer:
        """Return TRL's fastest setting: as kept for this machine and these versions, or searched, choice by choice."""
        file = self.results / "dpo_peer.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        known = kept.get(self.name, {"on": None, "best": {}})
        if not again and known["on"] == self.on and set(known["best"]) == set(CHOICES):
            return Peer(**known["best"])
        write_rows(self.root / "search.jsonl", min(self.steps, SEARCH_STEPS) * self.row.batch_size)
        tried: dict[Peer, float] = {}

        def seconds(peer: Peer) -> float:
            if peer not in tried:
                leg = self.leg(self.folder(), "search.jsonl", side="peer", peer=asdict(peer))
                tried[peer] = round(counted(leg["seconds"]), 2)
                print(f"  {tried[peer]} s by {peer}", flush=True)
            return tried[peer]

        best = Peer()
        for name, values in CHOICES.items():
            # where all weights are trained, 16-bit weights are another training
            allowed = [v for v in values if v != "bf16 base" or self.row.lora]
            if name == "at_once":
                allowed = [v for v in allowed if v <= self.row.batch_size]
            best = min((replace(best, **{name: value}) for value in allowed), key=seconds)
        searched = {str(peer): spent for peer, spent in tried.items()}
        kept[self.name] = {"best": asdict(best), "seconds": searched, "on": self.on}
        self.results.mkdir(exist_ok=True)
        file.write_text(json.dumps(kept, indent=2) + "\n")
        return best

    def sides(self, best: Peer, more: str) -> dict[str, dict[str, Any]]:
        """Return what runs by turns: ours also in the precision of the peer's best, where that is another."""
        sides: dict[str, dict[str, Any]] = {"TRL best": {"side": "peer", "peer": asdict(best)}}
        if self.name == "C3":
            sides["TRL defaults"] = {"side": "peer"}
        for precision in dict.fromkeys(("fp32", best.precision)):
            ours = {"side": "ours", "precision": precision, "more": more}
            sides[f"ours {OUR_NAMES[precision]}"] = ours
        return sides

    def ratios(self, of: str, first: list[float], second: list[float], targets: str) -> None:
        """Say ``first / second``."""
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        spread = f"min {least:.3f}, max {most:.3f}, {len(ratios)} pairs"
        self.say(f"{of}: median {middle:.3f} ({spread}); {targets}")

    def keep(self) -> None:
        """Append what was said to the results."""
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        self.results.mkdir(exist_ok=True)
        with open(self.results / "cpu.md", "a") as handle:
            handle.write(f"\n## {self.name}, {date.today()}, {commit}\n\n")
            handle.writelines(f"- {line}\n" for line in self.lines)


def by_turns(names: list[str], pairs: int) -> list[tuple[int, str]]:
    """Return A B, B A, A B ... with the number of each pair."""
    return [(p, name) for p in range(pairs) for name in names[:: 1 if p % 2 == 0 else -1]]


def compare_c3(bench: Bench, sides: dict[str, dict[str, Any]], pairs: int) -> None:
    """LoRA, one epoch: pairs per second."""
    rates: dict[str, list[float]] = defaultdict(list)
    for pair, name in by_turns(list(sides), pairs):
        run = bench.leg(bench.folder(), **sides[name])
        assert run["num_steps"] == bench.steps, run
        if run["settings"] and pair == 0:
            bench.say(f"{name}: {run['settings']}")
        seconds, count = run["seconds"], bench.steps * bench.row.batch_size
        rates[name].append(count / counted(seconds))
        line = f"pair {pair}, {name}: {rates[name][-1]:.3f} pairs/s"
        if "rehearsal" in seconds:
            rehearsed = count / (counted(seconds) + seconds["rehearsal"])
            rates[f"{name}, rehearsal counted"].append(rehearsed)
            line += f", with the rehearsal {rehearsed:.3f}"
        bench.say(f"{line}; {told(seconds)}")
    for ours in (name for name in rates if name.startswith("ours")):
        for theirs, must, aim in (("TRL best", 1.6, 2.0), ("TRL defaults", 2.5, 3.5)):
            targets = f"must: at least {must}, aim: {aim}"
            bench.ratios(f"pairs/s, {ours} / {theirs}", rates[ours], rates[theirs], targets)


def compare_c4(bench: Bench, sides: dict[str, dict[str, Any]], pairs: int) -> None:
    """All weights, three epochs, then with another beta: seconds of both runs, and of the second one's reference."""
    totals: dict[str, list[float]] = defaultdict(list)
    references: dict[str, list[list[float]]] = defaultdict(list)
    for pair, name in by_turns(list(sides), pairs):
        folder = bench.folder()
        runs = [bench.leg(folder, beta=beta, **sides[name]) for beta in BETAS]
        if runs[0]["settings"] and pair == 0:
            bench.say(f"{name}: {runs[0]['settings']}")
        totals[name].append(sum(run["seconds"]["total"] for run in runs))
        references[name].append([run["seconds"].get("reference", 0.0) for run in runs])
        for beta, run in zip(BETAS, runs, strict=True):
            bench.say(f"pair {pair}, {name}, beta {beta}: {told(run['seconds'])}")
    for ours in (name for name in sides if name.startswith("ours")):
        of, targets = f"seconds of both runs, TRL best / {ours}", "must: at least 1.4, aim: 1.8"
        bench.ratios(of, totals["TRL best"], totals[ours], targets)
    for name, seconds in references.items():
        if all(first for first, _ in seconds):
            first, second = zip(*seconds, strict=True)
            wanted = "must: at most 0.2, aim: 0.05" if name.startswith("ours") else "no target"
            bench.ratios(f"reference stage, second / first run, {name}", second, first, wanted)


def counted(seconds: dict[str, float]) -> float:
    """Return the seconds from the reference to the end of the last step, without what lies between."""
    return seconds.get("reference", 0.0) + seconds["steps"]


def told(seconds: dict[str, float]) -> str:
    """Say where the seconds went."""
    shown = [f"{name} {value:.2f}" for name, value in seconds.items() if name != "total"]
    return f"seconds: {', '.join(shown)}; all but the imports {seconds['total']:.2f}"


# ---- what both sides are given


def save_model(row: Row, root: Path) -> str:
    """Save a random Llama, and for the gate a new adapter of it; return what it is."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    sys.path.insert(0, str(HERE.parent / "tests"))
    from small_models import save_small_model

    sizes = {"hidden_size": row.width, "intermediate_size": row.width * 11 // 4 // 32 * 32}
    sizes |= {"num_hidden_layers": row.layers, "num_attention_heads": row.width // 64}
    sizes |= {"vocab_size": row.vocabulary, "max_position_embeddings": 1024}
    model = save_small_model(root / "model", **sizes)
    weights = model.num_parameters()
    lora = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = get_peft_model_state_dict(get_peft_model(model, lora))
    torch.save(adapter, root / "adapter.pt")
    return f"Llama L{row.layers} d{row.width} V{row.vocabulary}, {weights / 1e6:.1f}M weights"


def write_rows(file: Path, count: int) -> str:
    """Write pairs of random words, one token each, as long as real ones; return their mean lengths."""
    from small_models import TOKENIZER
    from transformers import AutoTokenizer

    tokenizer, draw = AutoTokenizer.from_pretrained(str(TOKENIZER)), random.Random(SEED)
    texts = [text[1:] for text in sorted(tokenizer.get_vocab()) if text[1:].isascii()]
    words = [t for t in texts if t.isalpha() and len(tokenizer(f" {t}")["input_ids"]) == 1]

    def text(mean: int, spread: float, least: int, most: int) -> str:
        length = round(mean * draw.lognormvariate(-(spread**2) / 2, spread))
        return " ".join(draw.choices(words, k=min(max(length, least), most)))

    tokens: dict[str, list[int]] = defaultdict(list)
    with open(file, "w") as handle:
        for _ in range(count):
            row: dict[str, Any] = {"prompt": text(256, 0.35, 64, 640)}
            row |= {side: f" {text(63, 0.45, 8, 255)}" for side in ("chosen", "rejected")}
            prompt, *answers = (len(tokenizer(value)["input_ids"]) for value in row.values())
            row["length"] = prompt + max(answers) + 1  # the peer groups by it
            handle.write(json.dumps(row) + "\n")
            tokens["prompt"].append(prompt)
            tokens["answer"] += [length + 1 for length in answers]  # the stop token
            tokens["longest of a pair"].append(row["length"])
    shown = [f"{name} {statistics.mean(of):.0f} (up to {max(of)})" for name, of in tokens.items()]
    return f"mean tokens: {', '.join(shown)}"


def cpu_model() -> str:
    """Return the CPU's name, and what it has for bfloat16."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()]
    known = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    flags = [f for f in ("avx512_bf16", "amx_bf16") if f in known.get("flags", "").split()]
    return f"{known.get('model name', 'CPU')} ({', '.join(flags) or 'no bfloat16 arithmetic'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=list(ROWS))
    parser.add_argument("--pairs", type=int, help="of legs; default 5")
    parser.add_argument("--steps", type=int, help="of an epoch; default 20 for C3, 6 for C4")
    parser.add_argument("--threads", type=int, default=2, help="of each leg")
    parser.add_argument("--search", action="store_true", help="search the peer's best again")
    parser.add_argument("--ours", default="", help="more of our command line, for experiments")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--leg", help="one leg, as JSON")
    asked = parser.parse_args()
    if asked.leg is not None:
        print("\n" + json.dumps(run_leg(Leg(**json.loads(asked.leg)))))
        return
    if asked.row is None:
        parser.error("give C3 or C4")
    root = Path(tempfile.mkdtemp(prefix="dpo_"))
    try:
        row = ROWS[asked.row]
        bench = Bench(asked.row, asked.steps or row.steps, asked.threads, asked.results, root)
        if asked.ours:
            bench.say(f"ours with {asked.ours}")
        bench.gate()
        sides = bench.sides(bench.best_peer(asked.search), asked.ours)
        compare = compare_c3 if asked.row == "C3" else compare_c4
        compare(bench, sides, asked.pairs or row.pairs)
        bench.keep()
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
