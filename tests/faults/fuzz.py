"""Mutated configs, flags and data files, in one process and as real ones: a clean message or a faithful run.

``python tests/faults/fuzz.py --count 10000 --seed 0 --processes 200`` prints every mutation that got neither.
"""

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz_configs import BASES, mutated_config, mutated_flags, unfaithful_settings
from fuzz_data import DATA_KINDS, mutated_data, unfaithful_rows
from harness import REPOSITORY, TOKENIZER

from fine_tune.data import SFTData
from fine_tune.exits import exit_code
from fine_tune.prepared_cli import PreparedCLI, prepare_as_fit
from fine_tune.quiet import quiet_libraries

SECONDS = 60
OURS = ("given.yaml", "rows", "base", "mutated")
NAMED = re.compile(r"error: (\S*/|-|[\w.]+: |[\w., ]+: |Parser key|.*(--|a flag was))")


class TooLong(BaseException):
    """A mutation that did not end in time; no ``except Exception`` swallows it."""


class Fuzzer:
    """Mutates, runs, judges; ``findings`` holds what was neither refused cleanly nor run faithfully.

    Args:
        folder: An empty folder; everything happens in it.
        seed: Decides every mutation.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.counts: Counter[tuple[str, int | str]] = Counter()
        self.findings: list[str] = []
        self.tokenizer: Any = None
        self.bases = {name: make(folder, TOKENIZER) for name, make in BASES.items()}

    def one(self, number: int, kind: str) -> None:
        """Run one mutation of a kind: config, flags or data."""
        rng = random.Random(f"{self.seed} {kind} {number}")
        if kind == "data":
            self._data(rng, number)
            return
        name = rng.choice(sorted(self.bases))
        config = self.folder / "given.yaml"
        mutate = mutated_config if kind == "config" else mutated_flags
        text, flags, done = mutate(self.bases[name], rng)
        config.write_bytes(text)
        args = [a.replace("CONFIG", str(config)) for a in flags]
        prepared: list[PreparedCLI] = []
        with contextlib.chdir(self.folder):
            code, told = self._outcome(lambda: prepared.append(prepare_as_fit(args)))
        given = text.decode("utf-8", "replace") + " ".join(args)
        wrong = self._judge(code, told, given)
        if code == 0 and prepared:
            wrong += unfaithful_settings(text, args, prepared[0])
        self._note(kind, number, code, f"{name}: {done}", wrong, told)

    def _data(self, rng: random.Random, number: int) -> None:
        kind = rng.choice(DATA_KINDS)
        path, options, done = mutated_data(self.folder, kind, rng)
        made: list[Any] = []

        def prepare() -> None:
            data = SFTData(
                path=str(path),
                split="none",
                batch_size=4,
                tokenizer=str(TOKENIZER),
                cache_dir=str(self.folder / "lightning_logs" / ".cache"),
                **options,
            )
            data._tokenizer = self.tokenizer
            data.prepare_data()
            self.tokenizer = data._tokenizer
            data.make_plan(3)
            made.append(data)

        with contextlib.chdir(self.folder):
            code, told = self._outcome(prepare)
            wrong = self._judge(code, told, "")
            if code == 0:
                wrong += unfaithful_rows(path, options, made[0])
        self._note("data", number, code, f"{kind}: {done}", wrong, told)

    def _outcome(self, run: Callable[[], Any]) -> tuple[int | str, str]:
        def late(*_: object) -> None:
            raise TooLong

        err, out = io.StringIO(), io.StringIO()
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
                code: int | str = exit_code(run)
        except TooLong:
            code = f"took more than {SECONDS} s"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "fine_tune" in f.filename] or frames
            at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
            code = f"{type(error).__name__} at {at}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return code, err.getvalue()

    def _judge(self, code: int | str, told: str, given: str) -> list[str]:
        wrong = [] if code in (0, 2) else [str(code)]
        if code == 2:
            wrong += wrong_message(told)
        left = {p.name for p in self.folder.iterdir()} - {"lightning_logs", *OURS}
        logs = self.folder / "lightning_logs"
        written = sorted(left | {p.name for p in logs.glob("*")} - {".cache"})
        for name in left:  # a run root or a cache that the mutation asked for
            place = self.folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        return wrong + (
            [f"written: {written}"] if any(name not in given for name in written) else []
        )

    def _note(
        self, kind: str, number: int, code: int | str, done: str, wrong: list[str], told: str
    ) -> None:
        self.counts[kind, code if code in (0, 2) else "other"] += 1
        for what in wrong:
            self.findings.append(f"[{kind} {number}] {done[:300]!r}: {what[:400]} | {told[:200]!r}")


def wrong_message(told: str) -> list[str]:
    """Say what is wrong with the lines that a refusal printed."""
    lines = [line for line in told.splitlines() if line.strip()]
    wrong = [] if lines and lines[0].startswith("error: ") else ["no line begins with 'error: '"]
    if any(not (c.isprintable() or c in "\n\t") for c in told):
        wrong.append("control characters reach the terminal")
    if len(told) > 30_000:
        wrong.append(f"a message of {len(told)} characters")
    for line in lines:
        if not line.startswith("error: "):
            continue
        if not NAMED.match(line):
            wrong.append(f"names neither key nor file: {line[:200]}")
    return wrong + (["Traceback"] if "Traceback" in told else [])


def fuzz(
    folder: Path,
    count: int,
    seed: int,
    *,
    first: int = 0,
    kinds: str = "config flags data",
    say: Callable[[str], None] = lambda _: None,
) -> Fuzzer:
    """Run ``count`` mutations in this process, a quarter config, a quarter flags, half data.

    Args:
        folder: An empty folder.
        count: Mutations.
        seed: Decides them all.
        first: Number of the first one, to go on or to look at one again.
        kinds: Which of them.
        say: Told each finding, and the count once in a while.
    """
    fuzzer, shown, start = Fuzzer(folder, seed), 0, time.monotonic()
    order = [kind for kind in ("config", "data", "flags", "data") if kind in kinds.split()]
    for number in range(first, first + count):
        fuzzer.one(number, order[number % len(order)])
        for finding in fuzzer.findings[shown:]:
            say(finding)
        shown = len(fuzzer.findings)
        if (number + 1) % 250 == 0:
            say(f"{number + 1}: {time.monotonic() - start:.0f} s, {dict(fuzzer.counts)}")
    return fuzzer


def fuzz_processes(
    folder: Path, count: int, seed: int, say: Callable[[str], None], *, first: int = 0
) -> Fuzzer:
    """Run mutated configs and flags as real processes of one step each."""
    fuzzer = Fuzzer(folder, seed)
    for number in range(first, first + count):
        rng = random.Random(f"{seed} process {number}")
        name = rng.choice(sorted(fuzzer.bases))
        mutate = mutated_config if number % 2 else mutated_flags
        text, flags, done = mutate(fuzzer.bases[name], rng)
        (folder / "given.yaml").write_bytes(text)
        args = [a.replace("CONFIG", str(folder / "given.yaml")) for a in flags]
        if any("\0" in arg for arg in args):
            continue
        command = [
            sys.executable,
            "-m",
            "fine_tune",
            "fit",
            *args,
            "--trainer.max_steps",
            "1",
            "--report",
            "null",
        ]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        try:
            ended = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=300, check=False
            )
            code: int | str = ended.returncode
            told = ended.stderr.decode("utf-8", "replace").replace("\ufffd", "?")
        except subprocess.TimeoutExpired:
            code, told = "took more than 300 s", ""
        wrong = [] if code in (0, 2) else [f"exit {code}: {told.strip()[-600:]}"]
        wrong += wrong_message(told) if code == 2 else []
        wrong += ["Traceback in a run that passed"] if code == 0 and "Traceback" in told else []
        shown = len(fuzzer.findings)
        fuzzer._note("process", number, code, f"{name}: {done}", wrong, "")
        for finding in fuzzer.findings[shown:]:
            say(finding)
    return fuzzer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", default="config flags data")
    parser.add_argument("--processes", type=int, default=0)
    asked = parser.parse_args()
    quiet_libraries()  # as the command line does

    def say(line: str) -> None:
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        done = fuzz(
            Path(one), asked.count, asked.seed, first=asked.first, kinds=asked.kinds, say=say
        )
        say(f"{dict(done.counts)} in {time.monotonic() - start:.0f} s, {len(done.findings)} wrong")
        real = fuzz_processes(Path(other), asked.processes, asked.seed, say, first=asked.first)
        say(f"{dict(real.counts)} as processes, {len(real.findings)} wrong")
    return 1 if done.findings or real.findings else 0


if __name__ == "__main__":
    sys.exit(main())
