"""Seconds to answer 500 rows of mixed length: predict beside transformers' generate, alternating in one run.

Both load the same folder, read the same JSONL, answer greedily and write JSONL. The peer is ``generate`` as it is used
most simply (a row at a time) or as its users batch it (32 rows in the file's order, padded on the left). The model has
random weights, wide enough for clear maxima, and 1 of 25 tokens ends an answer: answers have 1 to 96 tokens.

    python benchmarks/predict.py [--peer one|batch] [--size small|medium] [--pairs 5] [--threads 2]
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.__main__ import main as fine_tune

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small_models import save_small_model

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
}
NUM_ROWS, MAX_NEW_TOKENS, PEER_ROWS = 500, 96, 32
WORDS = [
    *("Berapa", "jumlah", "ibu", "kota", "negara", "provinsi", "tahun", "mata"),
    *("uang", "dari", "yang", "terletak", "di", "adalah"),
]


def make_model(folder: Path, size: str) -> None:
    """Save a model with clear maxima whose answers end after uneven numbers of tokens."""
    model: Any = save_small_model(
        folder, initializer_range=0.2, max_position_embeddings=512, **SIZES[size]
    )
    stops = [model.config.eos_token_id, *range(7, model.config.vocab_size, 25)]
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)


def make_rows(file: Path) -> None:
    """Write questions of 1 to 120 words, most of them short."""
    draw = random.Random(0)
    with open(file, "w") as handle:
        for _ in range(NUM_ROWS):
            words = draw.choices(WORDS, k=min(120, 1 + int(draw.expovariate(1 / 25))))
            handle.write(json.dumps({"text": " ".join(words)}) + "\n")


def run_peer(folder: Path, rows: Path, output: Path, at_once: int) -> tuple[float, float]:
    """Answer with transformers' generate; return the seconds, and those of the processor."""
    start, cpu = time.perf_counter(), time.process_time()
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    stops = model.generation_config.eos_token_id
    with open(output, "w") as handle, torch.inference_mode():
        for first in range(0, len(given), at_once):
            batch = given[first : first + at_once]
            texts = [row["text"] for row in batch]
            ids = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            written = model.generate(
                **ids,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            for row, answer in zip(
                batch, written[:, ids["input_ids"].shape[1] :].tolist(), strict=True
            ):
                end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
                text = tokenizer.decode(answer[:end], skip_special_tokens=True)
                handle.write(json.dumps({**row, "prediction": text, "tokens": end}) + "\n")
    return time.perf_counter() - start, time.process_time() - cpu


def run_ours(folder: Path, rows: Path, output: Path) -> tuple[float, float]:
    """Answer with predict; return the seconds, and those of the processor."""
    start, cpu = time.perf_counter(), time.process_time()
    code = fine_tune(
        [
            *("predict", "--model.model_name_or_path", str(folder)),
            *("--data.predict_path", str(rows), "--output", str(output), "--overwrite", "true"),
            *("--sampling.max_new_tokens", str(MAX_NEW_TOKENS)),
        ]
    )
    assert code == 0
    return time.perf_counter() - start, time.process_time() - cpu


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def run() -> None:
    """Alternate both, A B B A, and print the ratio of their times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=("one", "batch"), default="batch")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    at_once = 1 if args.peer == "one" else PEER_ROWS
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name) / "model", Path(name) / "rows.jsonl"
        make_model(folder, args.size)
        make_rows(rows)
        ours, theirs = Path(name) / "ours.jsonl", Path(name) / "theirs.jsonl"
        run_ours(folder, rows, ours)  # imports and first use
        run_peer(folder, rows, theirs, at_once)
        pairs = []
        for pair in range(args.pairs):
            first, second = (("ours", "theirs"), ("theirs", "ours"))[pair % 2]
            seconds = {}
            for who in (first, second):
                seconds[who] = (
                    run_ours(folder, rows, ours)
                    if who == "ours"
                    else run_peer(folder, rows, theirs, at_once)
                )
            pairs.append(seconds)
        same = sum(
            a["prediction"] == b["prediction"]
            for a, b in zip(read(ours), read(theirs), strict=True)
        )
        lengths = sorted(row["tokens"] for row in read(theirs))
    ratios, cpu_ratios = ([pair["theirs"][i] / pair["ours"][i] for pair in pairs] for i in (0, 1))
    names = ("torch", "transformers", "lightning")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in names)
    print(f"\npython {platform.python_version()}, {versions}, {args.threads} threads, {args.size}")
    print(f"answers: {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):g}")
    for who in ("ours", "theirs"):
        seconds = ", ".join(f"{pair[who][0]:.2f} ({pair[who][1]:.2f})" for pair in pairs)
        print(f"{who:<6} {seconds} s (of the processor)")
    print(f"theirs: generate, {at_once} at a time")
    print(f"equal answers: {same} of {NUM_ROWS}")
    for name, of in (("ratio", ratios), ("ratio of the processor's seconds", cpu_ratios)):
        print(f"{name}: {statistics.median(of):.2f} (min {min(of):.2f}, max {max(of):.2f})")
    print("must: at least 1.5")
    sys.exit(0 if statistics.median(ratios) >= 1.5 and same == NUM_ROWS else 1)


if __name__ == "__main__":
    run()
