"""Texts by the million: preparation's seconds and peak memory, seconds to the first step once prepared, and resume.

python -m benchmarks.texts 500000 1000000 5000000
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench, Measured, empty_folder
from benchmarks.inputs import SEED, WORDS

STEPS, RESUMED_AT = 12, (3, 10)


def write_texts(file: Path, count: int) -> None:
    """Write so many lines of 4 to 24 words and a number of their own."""
    draw = random.Random(SEED)
    with open(file, "w", encoding="utf-8") as handle:
        for i in range(count):
            handle.write(f"{i} {' '.join(draw.choices(WORDS, k=draw.randint(4, 24)))}\n")


def prepare(texts: str, model: str, cache: str) -> Measured:
    """Prepare the texts once, in this process; its own memory, without the pages of files that are mapped."""
    import threading
    import time

    from fine_tune.data import TextData

    def own_memory() -> float:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 2**20

    before, start = own_memory(), time.perf_counter()
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = TextData(texts, tokenizer=model, cache_dir=cache, max_length=256)
    data.prepare_data()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    rows = data.prepared.facts["splits"]["train"]["num_rows"]
    return {"seconds": seconds, "before": before, "peak": max(seen), "rows": rows}


def fit(line: list[str]) -> Measured:
    """Run our command line; return the seconds to the end of its first step."""
    import time

    from fine_tune.__main__ import main
    from fine_tune.modules import Pretrain

    start, ends = time.perf_counter(), []
    step = Pretrain.optimizer_step

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        ends.append(time.perf_counter())

    Pretrain.optimizer_step = timed  # type: ignore[method-assign]
    assert main(line) == 0
    return {"seconds": ends[0] - start}


def compare(bench: Bench, counts: list[int]) -> None:
    """Prepare each number of texts, train a little on them, and go on from a step drawn by lot."""
    from benchmarks.inputs import llama, save_model

    save_model(bench.root / "model", {**llama(2, 64, 4096), "intermediate_size": 128})
    for count in counts:
        texts, root = bench.root / f"{count}.txt", bench.root / f"run_{count}"
        write_texts(texts, count)
        given = {"texts": str(texts), "model": str(bench.root / "model"), "cache": str(root / "c")}
        made = bench.leg("benchmarks.texts:prepare", **given)
        bench.say(
            f"{count:,} texts ({texts.stat().st_size / 1e6:,.0f} MB): {made['rows']:,} rows, {made['seconds']:.0f} s, "
            f"peak {made['peak']:.2f} GiB ({made['before']:.2f} before)"
        )
        at = random.Random(count).randint(*RESUMED_AT)
        line = [
            *("fit", "--trainer.default_root_dir", str(root), "--model", "Pretrain"),
            *("--model.model_name_or_path", given["model"], "--data", "TextData"),
            *("--data.path", given["texts"], "--data.cache_dir", given["cache"]),
            *("--data.max_length", "256", "--trainer.max_steps", str(STEPS), "--report", "null"),
            *("--trainer.log_every_n_steps", "1"),
            *("--generations.rows", "0", "--trainer.limit_val_batches", "2"),
            *(
                "--trainer.callbacks+=benchmarks.time_to_resume.EndAfter",
                "--trainer.callbacks.step",
            ),
        ]
        whole = bench.leg("benchmarks.texts:fit", line=[*line, "1000000", "--name", "whole"])
        bench.say(f"{count:,} texts: {whole['seconds']:.1f} s from the command to the first step")
        _resume(bench, line, root, at)
        texts.unlink()


def _resume(bench: Bench, line: list[str], root: Path, at: int) -> None:
    """Stop a run after a step, go on from it, and compare with the run that was not stopped, bit for bit."""
    often = ["--name", "stopped", "--checkpoint.every", "2"]
    stopped = bench.leg("benchmarks.texts:stop", line=[*line, str(at), *often])
    assert stopped["stopped"]
    bench.leg("benchmarks.texts:fit", line=[*line, "1000000", *often, "--ckpt_path", "last"])
    runs = [root / "lightning_logs" / name / "version_0" for name in ("whole", "stopped")]
    same = _losses(runs[0]) == _losses(runs[1]) and _weights(runs[0]) == _weights(runs[1])
    verdict = "equal, bit for bit" if same else "NOT EQUAL"
    bench.say(f"stopped after step {at}, gone on to step {STEPS}: {verdict}")


def stop(line: list[str]) -> Measured:
    """Run a line that ends at once after a step."""
    from benchmarks.time_to_resume import Reached
    from fine_tune.__main__ import main

    try:
        main(line)
    except Reached:
        return {"stopped": True}
    return {"stopped": False}


def _losses(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [line.split(",")[column] for line in lines[1:]]


def _weights(run: Path) -> bytes:
    last = json.loads((run / "run.json").read_text())["last"]
    return (run / "checkpoints" / last / "model.safetensors").read_bytes()


if __name__ == "__main__":
    with empty_folder("texts") as root:
        bench = Bench("texts", Path(__file__).parent / "results", root)
        compare(bench, [int(count) for count in sys.argv[1:]])
        bench.keep()
