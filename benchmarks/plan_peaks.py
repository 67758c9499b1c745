"""``python -m benchmarks.plan_peaks``: what the plan says of a run's memory beside what the run takes of a device.

All weights, LoRA and QLoRA, with and without recomputed activations, two lengths, two models at random weights: each a
real ``fit`` of two steps of two micro-batches. The driver's part is in neither figure.
"""

import gc
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import REPOSITORY, machine, versions
from benchmarks.inputs import LORA, Length, save_model, write_rows
from benchmarks.rows import GPT_2, QWEN_05B
from fine_tune.device_memory import DeviceMemory, memory_of

MODELS = {"qwen2 0.5B": QWEN_05B, "gpt2 185M": GPT_2}
LENGTHS, ROWS, STEPS = (256, 1024), 4, 2
NEAR = 0.10  # of what is measured: how far off a plan may be
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        model: Its name.
        way: full, LoRA or QLoRA.
        recomputed: Whether activations are.
        length: Tokens of each row.
    """

    model: str
    way: str
    recomputed: bool
    length: int


@dataclass(frozen=True)
class Peak:
    """Bytes that the plan says and that the device had, of one run."""

    setting: Setting
    planned: int
    measured: int

    @property
    def off(self) -> float:
        """How far the plan is from the device, as a share of what the device had."""
        return self.planned / self.measured - 1


def settings(models: Iterable[str], lengths: Iterable[int]) -> list[Setting]:
    """Return all of them; QLoRA where bitsandbytes is installed."""
    ways = ["full", "LoRA", *(["QLoRA"] if find_spec("bitsandbytes") else [])]
    return [Setting(*of) for of in product(models, ways, (False, True), lengths)]


def peaks(
    models: dict[str, dict[str, Any]], lengths: tuple[int, ...], memory: DeviceMemory
) -> Iterator[Peak]:
    """Plan and run every setting on this machine's device.

    Args:
        models: Configs by name.
        lengths: Tokens of the rows.
        memory: The device's.
    """
    with tempfile.TemporaryDirectory(prefix="plan_peaks_") as folder:
        root = Path(folder)
        for name, config in models.items():
            save_model(root / name, config)
        for length in lengths:
            prompt = Length(length // 2, 0, 1, length)
            answer = Length(length - length // 2 - 1, 0, 1, length)  # and the stop token
            file = root / f"{length}.jsonl"
            write_rows(file, 2 * ROWS * STEPS, prompt, answer, ("completion",))
        for number, setting in enumerate(settings(models, lengths)):
            line = command_line(setting, root, root / f"run{number}")
            yield Peak(setting, planned(line, memory), measured(["fit", *line], memory))


def command_line(setting: Setting, root: Path, folder: Path) -> list[str]:
    """Return the flags of a run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = f"""
        --trainer.default_root_dir={folder} --trainer.accelerator={device} --trainer.devices=1
        --trainer.precision=bf16-mixed --trainer.max_steps={STEPS} --report=null --generations.rows=0
        --model=fine_tune.modules.SFT --vram_guard.rehearse=false
        --model.gradient_checkpointing={str(setting.recomputed).lower()}
        --data=fine_tune.data.SFTData --data.path={root}/{setting.length}.jsonl --data.split=none
        --data.batch_size={2 * ROWS} --data.cache_dir={root}/cache
        --data.max_tokens_per_micro_batch={ROWS * setting.length}""".split()
    line.append(f"--model.model_name_or_path={root / setting.model}")
    if setting.way != "full":
        line += [f"--model.lora.{key}={value}" for key, value in LORA.items()]
        line += ["--model.lora.target_modules=all-linear"]
    return line + ["--model.quantization=nf4"] * (setting.way == "QLoRA")


def planned(line: list[str], memory: DeviceMemory) -> int:
    """Return the bytes that the plan says."""
    from fine_tune.modules.memory_plan import MemoryPlanner
    from fine_tune.prepared_cli import prepare_as_fit

    run = prepare_as_fit(line)
    run.datamodule.setup("fit")
    precision, batch = str(run.settings.trainer.precision), run.datamodule.longest_rows("train")
    planner = MemoryPlanner(run.model, run.datamodule.tokenizer, precision, memory.total())
    return planner.at_once(run.model.model_settings, batch, ROWS).total


def measured(line: list[str], memory: DeviceMemory) -> int:
    """Run it and return the most bytes it took after its weights were loaded."""
    from fine_tune.__main__ import main as fine_tune
    from fine_tune.modules import SFT

    start, end = SFT.on_train_start, SFT.on_train_batch_end
    found: list[int] = []

    def from_here(self: SFT) -> None:
        start(self)
        memory.reset_peak()

    def until_here(self: SFT, *given: Any) -> None:
        end(self, *given)
        found.append(memory.peak())

    gc.collect()
    memory.clear_cache()
    before = memory.allocated()
    with (
        mock.patch.object(SFT, "on_train_start", from_here),
        mock.patch.object(SFT, "on_train_batch_end", until_here),
    ):
        code = fine_tune(line)
    assert code == 0 and len(found) == STEPS, (code, line)
    return found[-1] - before


def table(found: list[Peak]) -> str:
    """Return what was found, as it is kept."""
    where = [*machine("cuda" if torch.cuda.is_available() else "cpu", 1), *versions()]
    lines = [
        f"## The plan's peak beside the device's, {date.today()}",
        "",
        f"{', '.join(where)}; {ROWS} rows at once, bf16-mixed; must: within {NEAR:.0%}",
        "",
        "| Model | Trained | Recomputed | Length | Planned GiB | Measured GiB | Off |",
        "|---|---|---|---|---|---|---|",
    ]
    for peak in found:
        of = peak.setting
        sizes = f"{peak.planned / GIB:.3f} | {peak.measured / GIB:.3f} | {peak.off:+.1%}"
        recomputed = "yes" if of.recomputed else "no"
        lines.append(f"| {of.model} | {of.way} | {recomputed} | {of.length:,} | {sizes} |")
    return "\n".join(lines) + "\n"


def main(
    file: Path = REPOSITORY / "benchmarks" / "results" / "gpu.md",
) -> list[Peak]:
    """Measure on this machine's GPU, and append the table to the results."""
    found = list(peaks(MODELS, LENGTHS, memory_of(torch.device("cuda"))))
    with open(file, "a") as handle:
        handle.write(f"\n{table(found)}")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
