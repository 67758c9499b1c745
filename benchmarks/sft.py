"""SFT beside TRL's SFTTrainer and transformers' Trainer: C1 (all weights), C2 (LoRA), G1, G2 and G4 of the design.

Pretraining beside transformers' Trainer alone: C8 and G3.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Measured, by_turns, reached
from benchmarks.training import (
    Leg,
    TrainingBench,
    adapter_of,
    compare_rates,
    counted,
    lora_config,
    model_arguments,
    peer_arguments,
    peer_losses,
    used_settings,
)

PEERS = ("TRL", "Trainer")
# Of Phi-2 by QLoRA: its speed beside LoRA's; one row's memory, and that beside a published run's.
QLORA_RATE, ROW_GB, OF_PUBLISHED, PUBLISHED_GB = 0.92, 2.6, 0.46, 5.67


def run_trl(**given: Any) -> Measured:
    """Train with TRL's SFTTrainer."""
    import datasets
    from peft import set_peft_model_state_dict
    from transformers import AutoTokenizer
    from transformers.trainer_callback import CallbackHandler
    from trl import SFTConfig, SFTTrainer

    leg = Leg.of(given)
    settings = peer_arguments(leg)
    if leg.peer is not None:
        settings |= {"max_length": None, "model_init_kwargs": model_arguments(leg)}
    clock = leg.clock()
    clock.watch(datasets, "load_dataset", "tokenization")
    clock.watch(SFTTrainer, "_prepare_dataset", "tokenization")
    clock.watch(CallbackHandler, "on_train_begin", "begin")
    clock.watch(CallbackHandler, "on_step_end", "step")
    rows = datasets.load_dataset("json", data_files=leg.rows, cache_dir=f"{leg.folder}/cache")
    trainer = SFTTrainer(
        leg.model,
        args=SFTConfig(**settings),
        train_dataset=rows["train"],
        processing_class=AutoTokenizer.from_pretrained(leg.model),
        peft_config=lora_config(leg),
    )
    if leg.row.lora and leg.gate:
        set_peft_model_state_dict(trainer.model, adapter_of(leg))
    trainer.train()
    return clock.measured(losses=peer_losses(trainer), settings=used_settings(trainer))


def run_trainer(**given: Any) -> Measured:
    """Train with transformers' Trainer, the rows tokenized in one batched map."""
    import datasets
    from peft import get_peft_model, set_peft_model_state_dict
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )
    from transformers.trainer_callback import CallbackHandler

    leg = Leg.of(given)
    clock = leg.clock()
    clock.watch(datasets, "load_dataset", "tokenization")
    clock.watch(datasets.Dataset, "map", "tokenization")
    clock.watch(CallbackHandler, "on_train_begin", "begin")
    clock.watch(CallbackHandler, "on_step_end", "step")
    tokenizer = AutoTokenizer.from_pretrained(leg.model)
    rows = tokenized(Path(leg.rows), tokenizer, f"{leg.folder}/cache")
    model: Any = AutoModelForCausalLM.from_pretrained(leg.model, **model_arguments(leg))
    if leg.row.lora:
        model = get_peft_model(model, lora_config(leg))
        if leg.gate:
            set_peft_model_state_dict(model, adapter_of(leg))
    trainer = Trainer(
        model,
        TrainingArguments(**peer_arguments(leg)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    return clock.measured(losses=peer_losses(trainer), settings=used_settings(trainer))


def tokenized(file: Path, tokenizer: Any, cache: str) -> Any:
    """Return the rows of a file with ``input_ids`` and ``labels``, the prompt's -100; of a text, all but its first."""
    import datasets

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(rows["prompt"], add_special_tokens=False)["input_ids"]
        if "completion" in rows:
            answers = tokenizer(rows["completion"], add_special_tokens=False)["input_ids"]
        else:
            prompts, answers = [[tokenizer.eos_token_id] for _ in prompts], prompts
        answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
        pairs = list(zip(prompts, answers, strict=True))
        return {
            "input_ids": [[*prompt, *answer] for prompt, answer in pairs],
            "attention_mask": [[1] * (len(prompt) + len(answer)) for prompt, answer in pairs],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in pairs],
        }

    rows = datasets.load_dataset("json", data_files=str(file), cache_dir=cache)["train"]
    texts = [name for name in rows.column_names if name != "length"]
    return rows.map(encode, batched=True, remove_columns=texts)


def compare(bench: TrainingBench, pairs: int, search: bool, more: str) -> None:
    """Run a row: parity, the peer's best, then all sides by turns."""
    peers = ("Trainer",) if bench.row.task == "Pretrain" else PEERS
    bench.gate(peers)
    sides = bench.sides(bench.best_peer(search, peers), more)
    compare_rates(bench, sides, pairs)
    if bench.row.quantization:
        _beside_lora(bench, pairs)


def _beside_lora(bench: TrainingBench, pairs: int) -> None:
    """Compare QLoRA with LoRA, a whole step's tokens at once, and say what one row at a time takes."""
    row, precision = bench.row, "bf16" if bench.row.device == "cuda" else "fp32"
    length = row.prompt.mean + row.answer.mean + 1
    budget = row.batch_size * length
    rates: dict[str, list[float]] = {"QLoRA": [], "LoRA": []}
    whole = f"--data.max_tokens_per_micro_batch={budget}"
    for pair, name in by_turns(list(rates), pairs):
        of_side = row if name == "QLoRA" else replace(row, quantization=None)
        leg = bench.train("ours", row=of_side, precision=precision, more=whole)
        rates[name].append(bench.tokens / counted(leg))
        told = f"{rates[name][-1]:,.0f} tokens/s, peak {_gigabytes(leg):.2f} GB"
        bench.say(f"pair {pair}, {name}, {budget:,} tokens per micro-batch: {told}")
    of = f"tokens/s, {budget:,} tokens per micro-batch, QLoRA / LoRA"
    middle = bench.ratio(of, rates["QLoRA"], rates["LoRA"], "on one H200")
    bench.say(f"{of}: {reached(middle, at_least=QLORA_RATE)}")
    alone = f"--data.max_tokens_per_micro_batch={length} --model.gradient_checkpointing=true"
    peak = _gigabytes(bench.train("ours", precision=precision, more=alone))
    of_published = peak / PUBLISHED_GB
    bench.say(
        f"one row of {length:,} tokens at a time: peak {peak:.2f} GB, {reached(peak, at_most=ROW_GB, unit=' GB')}; "
        f"{of_published:.2f}x the published {PUBLISHED_GB} GB, {reached(of_published, at_most=OF_PUBLISHED, unit='x')}"
    )


def _gigabytes(leg: Measured) -> float:
    return float(leg.get("peak_gpu_gib", leg["peak_rss_gib"])) * 2**30 / 1e9
