"""C5: preparation of 50,000 prompt/completion rows, from the file to token ids: rows per second cold, seconds warm.

The peer is TRL's SFTTrainer, its ``load_dataset`` included, with one process (its default) and with two. A batched
``datasets.map`` written by hand is shown beside them, without a target. Ours with its default splits and its search for
leaked rows is shown beside ours without, which is what the peer does.
"""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench, Clock, Measured, by_turns, told
from benchmarks.inputs import Length, llama, save_model, write_rows

NUM_ROWS = 50_000


def run_ours(rows: str, folder: str, model: str, split: str | None) -> Measured:
    """Prepare with this project's data module."""
    from fine_tune.data import SFTData

    clock = Clock()
    clock.watch(SFTData, "prepare_data", "preparation")
    data = SFTData(path=rows, split=split, tokenizer=model, cache_dir=f"{folder}/cache")  # type: ignore[arg-type]
    data.prepare_data()
    measured = clock.measured()
    prepared = [of_split["input_ids"] for of_split in data.prepared.rows.values()]
    return measured | {"ids": digest(prepared) if split == "none" else None}


def run_trl(rows: str, folder: str, model: str, processes: int | None) -> Measured:
    """Prepare as TRL's SFTTrainer does."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock = Clock()
    clock.watch(datasets, "load_dataset", "preparation")
    clock.watch(SFTTrainer, "_prepare_dataset", "preparation")
    loaded = datasets.load_dataset("json", data_files=rows, cache_dir=f"{folder}/cache")["train"]
    arguments = SFTConfig(
        f"{folder}/peer", dataset_num_proc=processes, report_to="none", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=loaded,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return clock.measured() | {"ids": digest([trainer.train_dataset["input_ids"]])}


def run_map(rows: str, folder: str, model: str) -> Measured:
    """Prepare with one batched map, as a careful user would write it."""
    from transformers import AutoTokenizer

    from benchmarks import sft

    clock = Clock()
    clock.watch(sft, "tokenized", "preparation")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prepared = sft.tokenized(Path(rows), tokenizer, f"{folder}/cache")
    return clock.measured() | {"ids": digest([prepared["input_ids"]])}


def digest(columns: list[Any]) -> str:
    """Return a hash of the rows' ids, whatever their order."""
    texts = (" ".join(map(str, ids)) for column in columns for ids in column)
    hashes = sorted(hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def compare(bench: Bench, pairs: int, num_rows: int = NUM_ROWS) -> None:
    """Run the row."""
    model = bench.root / "model"
    save_model(model, llama(1, 64, 4096))
    written = write_rows(
        bench.root / "rows.jsonl",
        num_rows,
        Length(60, 0.5, 8, 400),
        Length(40, 0.5, 4, 300),
        ("completion",),
    )
    bench.say(f"{num_rows:,} rows; {written['told']}")
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "TRL, one process": ("run_trl", {"processes": None}),
        "TRL, two processes": ("run_trl", {"processes": 2}),
        "one batched map": ("run_map", {}),
        "ours, no splits": ("run_ours", {"split": "none"}),
        "ours, defaults": ("run_ours", {"split": None}),
    }
    cold: dict[str, list[float]] = defaultdict(list)
    warm: dict[str, list[float]] = defaultdict(list)
    ids: dict[str, str] = {}
    for pair, name in by_turns(list(sides), pairs):
        function, given = sides[name]
        folder = str(bench.folder())
        given = {
            **given,
            "rows": str(bench.root / "rows.jsonl"),
            "folder": folder,
            "model": str(model),
        }
        legs = [bench.leg(f"benchmarks.preparation:{function}", **given) for _ in range(2)]
        for seconds, leg in zip((cold, warm), legs, strict=True):
            seconds[name].append(leg["seconds"]["preparation"])
        if legs[0]["ids"] is not None:
            ids[name] = legs[0]["ids"]
        rate = num_rows / cold[name][-1]
        bench.say(
            f"pair {pair}, {name}: {rate:,.0f} rows/s cold; {told(legs[0])}; warm {told(legs[1])}"
        )
    same = len(set(ids.values())) == 1
    bench.say(f"token ids of {', '.join(ids)}: {'all equal' if same else 'NOT EQUAL'}")
    if not same:
        raise SystemExit("no parity, no ratio")
    best = min(("TRL, one process", "TRL, two processes"), key=lambda name: sum(cold[name]))
    for peer, targets in ((best, "must: at least 2, aim: 3"), ("one batched map", "no target")):
        for name in ("ours, no splits", "ours, defaults"):
            bench.ratio(f"rows/s cold, {name} / {peer}", cold[peer], cold[name], targets)
    for name in ("ours, no splits", "ours, defaults"):
        bench.ratio(f"seconds warm, {name} / {best}", warm[name], warm[best], "must: at most 0.5")
