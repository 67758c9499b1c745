"""How cost grows: tokens per second and memory over row length, model size and budget; preparation over rows.

Ours alone, each point a run in a process of its own: a table, and a picture beside the results.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench, Clock, Measured, largest_size
from benchmarks.inputs import Length, llama, save_model, write_rows
from benchmarks.training import Leg, Row, counted

TOKENS_PER_STEP, STEPS = 4096, 3
LENGTHS = (128, 256, 512, 1024, 2048)
MODELS = {
    "5M": (4, 256, 4096),
    "20M": (8, 448, 4096),
    "70M": (12, 640, 16_000),
    "200M": (16, 1024, 8192),
}
BUDGETS = (256, 512, 1024, 2048, 4096)
ROWS = (1_000, 10_000, 100_000, 1_000_000)


def prepare(rows: str, folder: str, model: str) -> Measured:
    """Prepare rows, without splits; what lies in memory before is told, too."""

    from fine_tune.data import SFTData

    before = largest_size()
    clock = Clock()
    data = SFTData(path=rows, split="none", tokenizer=model, cache_dir=f"{folder}/cache")
    data.prepare_data()
    return clock.measured() | {"rss_before_gib": before}


def row_of(length: int, config: dict[str, Any]) -> Row:
    """Return a run of rows of one length, as many as make up a step's tokens."""
    half = Length(length // 2, 0, 1, length)
    answer = replace(half, mean=length // 2 - 1)
    return Row(
        "SFT", config, half, answer, batch_size=max(1, TOKENS_PER_STEP // length), steps=STEPS
    )


def compare(bench: Bench, toy: bool) -> None:
    """Measure, say, and draw."""
    lengths, budgets, rows = (LENGTHS, BUDGETS, ROWS) if not toy else ((32, 64), (64,), (100,))
    models = MODELS if not toy else {"tiny": (2, 64, 4096)}
    small = llama(*next(iter(models.values())))
    drawn: dict[str, dict[Any, tuple[float, float]]] = {}

    def train(label: str, row: Row, more: str = "") -> tuple[float, float]:
        folder = bench.folder()
        save_model(folder / "model", row.config)
        written = write_rows(
            folder / "rows.jsonl", row.steps * row.batch_size, row.prompt, row.answer, row.answers
        )
        leg = Leg(row, str(folder), str(folder), str(folder / "rows.jsonl"), more=more)
        measured = bench.leg("benchmarks.training:run_ours", **asdict(leg))
        rate = written["tokens"] / counted(measured)
        bench.say(f"{label}: {rate:,.0f} tokens/s, peak {measured['peak_rss_gib']:.2f} GiB")
        return rate, measured["peak_rss_gib"]

    drawn["tokens of a row"] = {
        length: train(f"rows of {length} tokens", row_of(length, small)) for length in lengths
    }
    drawn["weights of the model"] = {
        name: train(f"{name} weights", row_of(min(256, lengths[-1]), llama(*sizes)))
        for name, sizes in models.items()
    }
    drawn["tokens of a micro-batch"] = {
        budget: train(
            f"{budget} tokens at once",
            row_of(min(256, lengths[-1]), small),
            f"--data.max_tokens_per_micro_batch={budget}",
        )
        for budget in budgets
    }
    drawn["rows to prepare"] = {}
    for count in rows:
        folder = bench.folder()
        save_model(folder / "model", llama(1, 64, 4096))
        of = (folder / "rows.jsonl", count, Length(30, 0.4, 8, 90), Length(20, 0.4, 4, 60))
        write_rows(*of, ("completion",))
        given = {"rows": str(of[0]), "folder": str(folder), "model": str(folder / "model")}
        leg = bench.leg("benchmarks.growth:prepare", **given)
        rate = count / leg["seconds"]["total"]
        more = leg["peak_rss_gib"] - leg["rss_before_gib"]
        bench.say(
            f"{count:,} rows prepared: {rate:,.0f} rows/s, peak {leg['peak_rss_gib']:.2f} GiB, "
            f"{more:.2f} more than before"
        )
        drawn["rows to prepare"][count] = rate, leg["peak_rss_gib"]
    bench.results.mkdir(exist_ok=True)
    draw(drawn, bench.results / "growth.svg")


def draw(drawn: dict[str, dict[Any, tuple[float, float]]], file: Path) -> None:
    """Draw rate and memory over each thing that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(drawn), figsize=(4 * len(drawn), 6), squeeze=False)
    for column, (name, points) in enumerate(drawn.items()):
        labels = [f"{key:,}" if isinstance(key, int) else key for key in points]
        unit = "rows/s" if name.startswith("rows") else "tokens/s"
        for line, unit_of_line in enumerate((unit, "peak RSS, GiB")):
            axis = axes[line][column]
            axis.plot(labels, [point[line] for point in points.values()], marker="o")
            axis.set_ylim(bottom=0)
            axis.set_ylabel(unit_of_line)
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
