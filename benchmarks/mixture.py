"""A mixture of experts beside a dense model of as many active parameters, on the same tokens: quality and speed.

python -m benchmarks.mixture texts.txt --steps 400    (without texts: some that tell facts; ``--toy``)
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Bench, Measured, by_turns, empty_folder

EXPERTS, ACTIVE, WIDTH_OF_EXPERT = 8, 2, 128
SHARED = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": ACTIVE * WIDTH_OF_EXPERT,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SIDES: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", **SHARED},
    "mixture": {
        "model_type": "qwen3_moe",
        **SHARED,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "moe_intermediate_size": WIDTH_OF_EXPERT,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    },
}
QUALITY = ("val/loss", "val/perplexity", "val/bits_per_byte")


def command(line: list[str]) -> Measured:
    """Run our command line in this process."""
    from fine_tune.__main__ import main

    assert main(line) == 0
    return {}


def fit(line: list[str], run: str) -> Measured:
    """Train, and return what the run wrote of quality and speed, and how many weights it has."""
    command(line)
    with open(Path(run) / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    evaluated = [row for row in rows if row.get(QUALITY[0])][-1]
    rates = [float(r["perf/tokens_per_second"]) for r in rows if r.get("perf/tokens_per_second")]
    measured = {name: float(evaluated[name]) for name in QUALITY}
    return measured | {"rate": statistics.median(rates), **parameters(Path(run))}


def parameters(run: Path) -> dict[str, int]:
    """Count a run's weights, and those at work for a token: of the experts only as many as are chosen."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    last = json.loads((run / "run.json").read_text())["last"]
    config = AutoConfig.from_pretrained(run / "checkpoints" / last)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    return {"total": total, "active": total - of_experts * (EXPERTS - ACTIVE) // EXPERTS}


def compare(bench: Bench, texts: str | None, document: str, steps: int, seeds: int) -> None:
    """Train both sides on the same rows in the same order, once for each seed, and say how each did."""
    path = texts or _made(bench)
    tokenizer, cache = str(bench.root / "tokenizer"), str(bench.root / "cache")
    made = ["train-tokenizer", "--input", json.dumps([path]), "--output", tokenizer]
    bench.leg("benchmarks.mixture:command", line=[*made, "--vocab_size", "2000"])
    found: dict[str, list[Measured]] = {name: [] for name in SIDES}
    for seed, name in by_turns(list(SIDES), seeds):
        line = [
            *("fit", "--name", f"{name}_{seed}", "--trainer.default_root_dir", str(bench.root)),
            *("--seed_everything", str(seed), "--report", "null", "--generations.rows", "0"),
            *("--model", "Pretrain", "--model.from_config", json.dumps(SIDES[name])),
            *("--model.tokenizer", tokenizer, "--model.optimizer.lr", "2e-3"),
            *("--model.warmup_ratio", "0.1", "--data", "TextData", "--data.path", path),
            *("--data.document", document, "--data.cache_dir", cache),
            *("--data.split", "{train: 0.9, validation: 0.1}", "--data.seed", str(seed)),
            *("--data.max_length", "128", "--data.batch_size", "16"),
            *("--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"),
        ]
        run = str(bench.root / "lightning_logs" / f"{name}_{seed}" / "version_0")
        measured = bench.leg("benchmarks.mixture:fit", line=line, run=run)
        found[name].append(measured)
        loss, perplexity, bits = (measured[of] for of in QUALITY)
        bench.say(
            f"seed {seed}, {name}: {measured['active']:,} active of {measured['total']:,} parameters, {steps} steps; "
            f"validation loss {loss:.4f}, perplexity {perplexity:.2f}, {bits:.4f} bits per byte; "
            f"{measured['rate']:,.0f} tokens/s"
        )
    dense, mixture = found["dense"], found["mixture"]
    for of, what in (("active", "active parameters"), ("val/bits_per_byte", "bits per byte")):
        _ratio(bench, what, of, mixture, dense)
    _ratio(bench, "tokens/s", "rate", mixture, dense)


def _ratio(
    bench: Bench, what: str, of: str, mixture: list[Measured], dense: list[Measured]
) -> None:
    sides = ([measured[of] for measured in side] for side in (mixture, dense))
    bench.ratio(f"{what}, mixture / dense", *sides, targets="no target")


def _made(bench: Bench) -> str:
    places = (REPOSITORY / "fine_tune" / "quickstart", REPOSITORY / "configs" / "masa")
    facts = json.dumps([str(place / "facts.yaml") for place in places])
    line = ["make-qa", "--facts", facts, "--output", str(bench.root / "made")]
    bench.leg("benchmarks.mixture:command", line=[*line, "--corpus_texts", "2000"])
    return str(bench.root / "made" / "corpus.txt")


def main() -> None:
    """Compare the two on a text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixture", description=__doc__)
    parser.add_argument("texts", nargs="?", help="a file of texts, or a folder of them")
    parser.add_argument("--document", choices=["line", "paragraph", "file"], default="line")
    parser.add_argument("--steps", type=int, default=400, help="of 16 rows of 128 tokens")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each leg")
    parser.add_argument("--toy", action="store_true", help="2 steps, not kept")
    asked = parser.parse_args()
    with empty_folder("mixture") as root:
        results = Path(__file__).parent / "results"
        bench = Bench("mixture", results, root, threads=asked.threads)
        texts = str(Path(asked.texts).resolve()) if asked.texts else None
        compare(bench, texts, asked.document, 2 if asked.toy else asked.steps, asked.seeds)
        if not asked.toy:
            bench.keep()


if __name__ == "__main__":
    main()
