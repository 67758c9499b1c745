"""What all rows share: legs in processes of their own, a clock inside them, sides by turns, results that are kept."""

import contextlib
import functools
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "lightning", "accelerate", "datasets")

Measured = dict[str, Any]


class Clock:
    """Beginnings and ends of the calls of some functions, by name; made after the imports.

    Args:
        num_steps: Optimizer steps there will be: a GPU is waited for after the last one, and after ``begin``.
        warmup: Steps at the start that are not counted: what is compiled is compiled in them.
    """

    def __init__(self, num_steps: int = 0, warmup: int = 0) -> None:
        self.num_steps, self.warmup = num_steps, warmup
        self.start, self.peak = time.perf_counter(), 0.0
        self.calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Note all calls of a function of a class or module."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.peak = max(self.peak, largest_size())  # a guard of ours makes the system forget it
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                num = self.num("step") + 1
                if name == "begin" or (name == "step" and num in (self.warmup, self.num_steps)):
                    wait_for_gpu()
                self.calls[name].append((start, time.perf_counter()))

        setattr(owner, function, call)

    def num(self, name: str) -> int:
        """Return how often a function was called."""
        return len(self.calls[name])

    def measured(self, **more: Any) -> Measured:
        """Return the seconds of each name, of the steps that count and in all, and the memory's peaks."""
        total, calls = time.perf_counter() - self.start, dict(self.calls)
        ends, begins = ([end for _, end in calls.pop(name, [])] for name in ("step", "begin"))
        seconds = {name: sum(b - a for a, b in spans) for name, spans in calls.items()}
        if ends:
            seconds["steps"] = ends[-1] - (ends[self.warmup - 1] if self.warmup else begins[-1])
        peak = max(self.peak, largest_size())
        told = {"seconds": seconds | {"total": total}, "num_steps": len(ends), "peak_rss_gib": peak}
        return told | gpu_peak() | more


def largest_size() -> float:
    """Return the most memory this process had, in GiB, since its start or since the system was told to forget."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def wait_for_gpu() -> None:
    """Wait until a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_peak() -> Measured:
    """Return the most memory that tensors took on a GPU, where there is one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30}


class Bench:
    """One row of the design's tables: its folder, its legs, and what is said of them.

    Args:
        name: C1, G1 ...
        results: Where the peer's best setting and the results are kept.
        root: An empty folder.
        device: cpu or cuda.
        threads: Of each leg.
    """

    def __init__(
        self, name: str, results: Path, root: Path, device: str = "cpu", threads: int = 2
    ) -> None:
        self.name, self.results, self.root, self.threads = name, results, root, threads
        self.num_folders = 0
        self.lines: list[str] = []
        self.on = [*machine(device, threads), f"python {sys.version.split()[0]}", *versions()]
        self.say(", ".join(self.on))

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

    def leg(self, function: str, **given: Any) -> Measured:
        """Run ``module:function`` in a process of its own and return what it does.

        What the first process of a function imports, later ones have imported before their clock starts.
        """
        command = [sys.executable, "-m", "benchmarks.harness", str(self.root), function]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        given_text = json.dumps(given)
        ended = subprocess.run(
            [*command, given_text], capture_output=True, text=True, env=env, cwd=REPOSITORY
        )
        if ended.returncode:
            sys.exit(
                f"{function} failed with {given}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}"
            )
        return json.loads(ended.stdout.splitlines()[-1])

    def best(
        self,
        choices: dict[str, tuple[Any, ...]],
        seconds_of: Callable[[dict[str, Any]], float],
        again: bool,
    ) -> dict[str, Any]:
        """Return the peer's fastest setting: as kept for this machine and these versions, or searched.

        Args:
            choices: Values of each setting; the search takes one setting after the other, from the first values.
            seconds_of: Runs a setting.
            again: Search whatever is kept.
        """
        file = self.results / "peer_settings.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        known = kept.get(self.name, {"on": None, "best": {}})
        if not again and known["on"] == self.on and set(known["best"]) == set(choices):
            return known["best"]
        best = {name: values[0] for name, values in choices.items()}
        tried: dict[str, float] = {}

        def seconds(setting: dict[str, Any]) -> float:
            key = ", ".join(f"{name} {value}" for name, value in setting.items())
            if key not in tried:
                tried[key] = round(seconds_of(setting), 2)
                print(f"  {tried[key]} s by {key}", flush=True)
            return tried[key]

        for name, values in choices.items():
            best = min(({**best, name: value} for value in values), key=seconds)
        kept[self.name] = {"best": best, "seconds": tried, "on": self.on}
        self.results.mkdir(exist_ok=True)
        file.write_text(json.dumps(kept, indent=2) + "\n")
        return best

    def ratio(self, of: str, first: list[float], second: list[float], targets: str) -> float:
        """Say ``first / second``, pair by pair, and return the median."""
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        spread = f"min {least:.3f}, max {most:.3f}, {len(ratios)} pairs"
        self.say(f"{of}: median {middle:.3f} ({spread}); {targets}")
        return middle

    def keep(self) -> None:
        """Append what was said to the results."""
        git = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"
        self.results.mkdir(exist_ok=True)
        with open(self.results / f"{'gpu' if self.name[0] == 'G' else 'cpu'}.md", "a") as handle:
            handle.write(f"\n## {self.name}, {date.today()}, {commit}\n\n")
            handle.writelines(f"- {line}\n" for line in self.lines)


@contextlib.contextmanager
def empty_folder(name: str) -> Iterator[Path]:
    """Make a folder for a row, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def by_turns(names: list[str], pairs: int) -> list[tuple[int, str]]:
    """Return A B, B A, A B ... with the number of each pair."""
    return [(p, name) for p in range(pairs) for name in names[:: 1 if p % 2 == 0 else -1]]


def told(measured: Measured) -> str:
    """Say where the seconds went, and the memory."""
    shown = [f"{name} {value:.2f}" for name, value in measured["seconds"].items()]
    memory = f"peak {measured['peak_rss_gib']:.2f} GiB"
    if "peak_gpu_gib" in measured:
        memory += f", on the GPU {measured['peak_gpu_gib']:.2f} GiB"
    return f"seconds: {', '.join(shown)}; {memory}"


def reached(
    value: float, *, at_least: float | None = None, at_most: float | None = None, unit: str = ""
) -> str:
    """Say an absolute target and whether a value reaches it."""
    wanted = at_least if at_least is not None else at_most
    assert wanted is not None, "one of the two bounds is given"
    is_reached = value >= wanted if at_least is not None else value <= wanted
    bound = "least" if at_least is not None else "most"
    return f"must: at {bound} {wanted:,g}{unit}: {'reached' if is_reached else 'missed'}"


def machine(device: str, threads: int) -> list[str]:
    """Return the processor, what it has for bfloat16, and the GPU where one is used."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines()]
    known = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    flags = [f for f in ("avx512_bf16", "amx_bf16") if f in known.get("flags", "").split()]
    name = f"{known.get('model name', 'CPU')} ({', '.join(flags) or 'no bfloat16 arithmetic'})"
    if device == "cpu":
        return [name, f"{threads} threads"]
    import torch

    return [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", name]


def versions() -> list[str]:
    """Return the versions of the packages that are here."""
    shown = []
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            shown.append(f"{package} {metadata.version(package)}")
    return shown


def _run_leg(root: Path, function: str, given: dict[str, Any]) -> None:
    imports = root / f"{function.replace(':', '.')}.imports"
    for module in imports.read_text().split() if imports.exists() else []:
        with contextlib.suppress(ImportError):  # made at run time, not by an import
            importlib.import_module(module)
    module_name, name = function.split(":")
    measured = getattr(importlib.import_module(module_name), name)(**given)
    if not imports.exists():
        imports.write_text("\n".join(sorted(sys.modules)))
    print("\n" + json.dumps(measured))


if __name__ == "__main__":
    _run_leg(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
