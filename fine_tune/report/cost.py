"""What a run took, and the commands that reproduce it or go on from it."""

import shlex
import statistics

from fine_tune.report.blocks import Block, Code, Facts, Section, Sentences
from fine_tune.report.record import RunRecord, is_number
from fine_tune.report.words import Words
from fine_tune.runs.results import timed_steps
from fine_tune.runs.run_folder import RunFolder

PYTHON = "python -m fine_tune"


def cost(run: RunRecord, words: Words, grid: float | None) -> Section:
    """Say what training took: time, tokens, memory, energy, CO2e.

    Args:
        run: The run.
        words: The language.
        grid: Grams of CO2e per kWh; None: not given.
    """
    unknown = words("unknown")
    trained, peak = trained_tokens(run), peak_gib(run)
    rates = run.curve("perf/tokens_per_second").finite().values
    evaluation = _evaluation_seconds(run)
    pairs = [
        (words("time"), _time(run, words)),
        (words("of_evaluation"), words.seconds(evaluation) if evaluation is not None else unknown),
        (words("trained_tokens"), words.number(trained) if trained else unknown),
        (words("rate"), words.number(statistics.median(rates.tolist())) if len(rates) else unknown),
        (words("peak_memory"), words("gib", value=peak) if peak is not None else unknown),
    ]
    watt_hours = run.record.get("energy", {}).get("watt_hours")
    energy = co2e = words("not_measured")
    if isinstance(watt_hours, int | float):
        energy, co2e = words("watt_hours", value=float(watt_hours)), words("co2e_no_factor")
        if len(run.record.get("starts", [])) > 1:  # the counter is kept when a start ends
            energy = words("energy_of_starts", energy=energy)
        if grid is not None:
            co2e = words("co2e_of", grams=watt_hours / 1000 * grid, factor=grid)
    pairs += [(words("energy"), energy), (words("co2e"), co2e)]
    return Section("cost", words("cost"), [Facts(pairs)])


def grid_problems(grid: float | None) -> list[str]:
    """Say what is wrong with the grams of CO2e per kWh that were given, if any were."""
    if grid is None or (is_number(grid) and grid >= 0):
        return []
    return [f"grid_gco2e_per_kwh: must be grams of CO2e per kWh, from 0 up; got {grid}"]


def _time(run: RunRecord, words: Words) -> str:
    seconds, starts = run.record.get("seconds"), len(run.record.get("starts", []))
    if not seconds:
        return words("unknown")
    told, timed = words.seconds(seconds), _count(timed_steps(run.record))
    if 0 < timed < run.step:
        return words("time_of_steps", time=told, timed=timed, steps=run.step)
    return told if starts < 2 else words("time_of_starts", time=told, count=starts)


def _count(ranges: list[tuple[int, int]]) -> int:
    """Count the steps in ranges, once where they overlap: those that a run went back over."""
    return len({step for first, last in ranges for step in range(first, last)})


def _evaluation_seconds(run: RunRecord) -> float | None:
    """Return what evaluations took of the time that is told."""
    curve = run.curve("perf/evaluation_seconds").finite()
    timed = timed_steps(run.record) or [(0, run.step)]
    known = [
        seconds
        for step, seconds in zip(curve.steps, curve.values, strict=True)
        if any(first < step <= last for first, last in timed)
    ]
    return float(sum(known)) if known else None


def trained_tokens(run: RunRecord) -> int | None:
    """Return the tokens of all steps taken."""
    per_epoch = run.record.get("steps_per_epoch")
    tokens = run.record.get("num_tokens", {}).get("train")
    known = isinstance(tokens, int) and per_epoch
    return round(tokens * run.step / per_epoch) if known and per_epoch and tokens else None


def peak_gib(run: RunRecord) -> float | None:
    """Return the largest memory that was logged: a GPU's own peak, or the process's at the logged steps."""
    names = ("perf/vram_peak_gib", "perf/memory_allocated_gib")
    peaks = [run.curve(name).finite().values for name in names]
    return max((float(values.max()) for values in peaks if len(values)), default=None)


def _command(run: RunRecord, verb: str) -> str:
    """Write a command for the run's settings, begun where they were given: they may name files from there."""
    config, directory = run.path / "config.yaml", RunFolder(run.path).known_directory(run.record)
    if directory is None:
        return f"{PYTHON} {verb} --config {shlex.quote(str(config))}"
    config = config.resolve()
    config = config.relative_to(directory) if config.is_relative_to(directory) else config
    return (
        f"cd {shlex.quote(str(directory))} && {PYTHON} {verb} --config {shlex.quote(str(config))}"
    )


def commands(run: RunRecord, words: Words) -> Section:
    """Give the commands that reproduce the run, go on with it, and test it; and those that made it."""
    blocks: list[Block] = []
    fit = _command(run, "fit")
    if run.config:
        blocks.append(Code(words("reproduce"), [fit]))
    if run.config and run.record.get("last"):
        done = run.status == "finished"
        longer = f"{fit} --ckpt_path last --data.epochs N"
        blocks.append(
            Code(words("extend"), [longer])
            if done
            else Code(words("resume"), [f"{fit} --ckpt_path last"])
        )
    if run.config and run.record.get("last") and "test" in run.record.get("num_rows", {}):
        blocks.append(Code(words("test_command"), [f"{_command(run, 'test')} --ckpt_path best"]))
    made = [
        f"cd {shlex.quote(str(entry.get('directory', '.')))} && {PYTHON} {shlex.join(map(str, entry['command']))}"
        for entry in run.record.get("commands", [])
        if isinstance(entry.get("command"), list)
    ]
    if made:
        blocks.append(Code(words("made_by"), made))
    return Section(
        "commands", words("commands"), blocks or [Sentences([("note", words("no_commands"))])]
    )
