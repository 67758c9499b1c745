"""C7: evaluation of 2,000 rows of mixed length: real tokens per second, and whether the loss depends on the batches.

The peer is TRL's and transformers' ``evaluate`` in float32, rows grouped by length, at the fastest of several batch
sizes and of both. Its loss is a mean of batch means, so the gate's rows have answers of one
length, where that mean is the mean over tokens; on the other rows the losses of several batch sizes are shown.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench, Clock, Measured, by_turns, told
from benchmarks.inputs import Length, llama, save_model, write_rows

NUM_ROWS = 2_000
PROMPT, ANSWER = Length(90, 0.6, 8, 600), Length(60, 0.6, 8, 300)
DIFFERENCE = 1e-6


def run_ours(rows: str, folder: str, model: str, rows_at_once: int | None) -> Measured:
    """Evaluate with ``validate``."""
    from fine_tune.__main__ import main as fine_tune
    from fine_tune.modules import SFT

    line = f"""
        validate --trainer.default_root_dir={folder} --trainer.accelerator=cpu --model=fine_tune.modules.SFT
        --model.model_name_or_path={model} --data=fine_tune.data.SFTData --data.cache_dir={folder}/cache
        --data.near_duplicates=1""".split()
    paths = {"train": rows.replace(".jsonl", "_train.jsonl"), "validation": rows}
    line += ["--data.path", json.dumps(paths)]
    if rows_at_once is not None:
        line += [f"--data.eval_batch_size={rows_at_once}"]
    clock = Clock()
    clock.watch(SFT, "on_validation_epoch_start", "begin")
    clock.watch(SFT, "on_validation_epoch_end", "step")
    losses: list[float] = []
    logged = SFT.log_dict

    def log_dict(self: Any, values: dict[str, Any], **options: Any) -> None:
        losses.extend(float(value) for name, value in values.items() if name == "val/loss")
        logged(self, values, **options)

    SFT.log_dict = log_dict  # type: ignore[method-assign]
    assert fine_tune(line) == 0
    return clock.measured(loss=losses[0])


def run_peer(
    rows: str, folder: str, model: str, trainer: str, rows_at_once: int, grouped: bool
) -> Measured:
    """Evaluate with TRL's SFTTrainer or with transformers' Trainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer
    from trl import SFTConfig, SFTTrainer

    from benchmarks.sft import tokenized

    clock = Clock()
    clock.watch(Trainer, "evaluation_loop", "evaluation")
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = tokenized(Path(rows), tokenizer, f"{folder}/cache")
    arguments = SFTConfig(
        f"{folder}/peer",
        per_device_eval_batch_size=rows_at_once,
        train_sampling_strategy="group_by_length" if grouped else "random",
        prediction_loss_only=True,
        max_length=None,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    given: dict[str, Any] = {"args": arguments, "processing_class": tokenizer, "eval_dataset": data}
    if trainer == "TRL":
        given["train_dataset"] = data
        evaluator: Any = SFTTrainer(model, **given)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model)
        evaluator = Trainer(loaded, data_collator=DataCollatorForSeq2Seq(tokenizer), **given)
    return clock.measured(loss=evaluator.evaluate()["eval_loss"])


def seconds_of(leg: Measured) -> float:
    """Return the seconds of the evaluation itself."""
    seconds = leg["seconds"]
    return float(seconds["evaluation"] if "evaluation" in seconds else seconds["steps"])


def compare(bench: Bench, pairs: int, search: bool, num_rows: int = NUM_ROWS) -> None:
    """Run the row."""
    model = bench.root / "model"
    bench.say(f"{save_model(model, llama(6, 256, 4096))[0]}, float32")

    def write(name: str, count: int, answer: Length = ANSWER) -> dict[str, Any]:
        other = bench.root / name.replace(".jsonl", "_train.jsonl")
        write_rows(other, 1, PROMPT, ANSWER, ("completion",))
        return write_rows(bench.root / name, count, PROMPT, answer, ("completion",))

    def ours(rows: str = "rows.jsonl", rows_at_once: int | None = None) -> Measured:
        given = {"rows": str(bench.root / rows), "folder": str(bench.folder()), "model": str(model)}
        return bench.leg("benchmarks.evaluation:run_ours", **given, rows_at_once=rows_at_once)

    def peer(rows: str = "rows.jsonl", **setting: Any) -> Measured:
        given = {"rows": str(bench.root / rows), "folder": str(bench.folder()), "model": str(model)}
        return bench.leg("benchmarks.evaluation:run_peer", **given, **setting)

    defaults = {"trainer": "TRL", "rows_at_once": 8, "grouped": False}
    write("gate.jsonl", 64, replace(ANSWER, spread=0.0))
    a, b = ours("gate.jsonl")["loss"], peer("gate.jsonl", **defaults)["loss"]
    bench.say(f"parity: 64 rows, losses {a:.6f} and {b:.6f}, {abs(a / b - 1):.1e} apart, relative")
    if abs(a / b - 1) > DIFFERENCE:
        raise SystemExit("no parity, no ratio")

    write("search.jsonl", min(num_rows, 200))
    choices = {
        "rows_at_once": (8, 32, 16, 4, 2, 1),
        "grouped": (True, False),
        "trainer": ("TRL", "Trainer"),
    }
    best = bench.best(choices, lambda setting: seconds_of(peer("search.jsonl", **setting)), search)
    written = write("rows.jsonl", num_rows)
    bench.say(f"{num_rows:,} rows; {written['told']}; the peer's best: {json.dumps(best)}")
    losses: dict[str, list[float]] = {"ours": [], "TRL, of 200 rows": []}
    for rows_at_once in (1, 8, 32):
        losses["ours"].append(ours(rows_at_once=rows_at_once)["loss"])
        few = {**defaults, "rows_at_once": rows_at_once}
        losses["TRL, of 200 rows"].append(peer("search.jsonl", **few)["loss"])
    for name, values in losses.items():
        apart = max(values) / min(values) - 1
        targets = "must: at most 1e-06" if name == "ours" else "no target"
        shown = ", ".join(f"{value:.7f}" for value in values)
        bench.say(
            f"loss at 1, 8 and 32 rows, {name}: {shown}; {apart:.1e} apart, relative; {targets}"
        )

    sides = {"peer best": lambda: peer(**best), "ours": ours}
    rates: dict[str, list[float]] = defaultdict(list)
    for pair, name in by_turns(list(sides), pairs):
        leg = sides[name]()
        rates[name].append(written["tokens"] / seconds_of(leg))
        bench.say(f"pair {pair}, {name}: {rates[name][-1]:,.0f} tokens/s; {told(leg)}")
    targets = "must: at least 1.5, aim: 2.5"
    bench.ratio("tokens/s, ours / peer best", rates["ours"], rates["peer best"], targets)
