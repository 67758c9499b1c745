"""The report: written by fit and test, honest about every run, harmless whatever the rows say, quick and small."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import REPOSITORY, CommandLine, write_rows
from markdown_it import MarkdownIt
from report_page import ReportPage

from fine_tune.callbacks.loss_spikes import LossSpikes
from fine_tune.device_energy import EnergyMeter
from fine_tune.report.write import write_report

HOSTILE = [
    "<script>alert(1)</script>",
    "\x1b]0;owned\x07\x1b[31mred",
    "=cmd|' /C calc'!A0",
    "<img src=http://evil.example/x onerror=alert(1)>",
    "](javascript:alert(1)) ![x](http://evil.example/y)",
    "{{ 7 * 7 }} {% raw %}",
    "</td></tr></table></section><h1>mine",
    "| a | b |\n| --- | --- |",
]


def report_of(folder: Path) -> ReportPage:
    return ReportPage(folder / "report.html")


def test_fit_and_test_write_the_report_and_say_where(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    outcome = command_line("fit", *fit_args, "--report", "en")
    assert outcome.code == 0, outcome.err
    folder = outcome.run().path
    assert f"report: {folder / 'report.html'}" in outcome.out
    page = report_of(folder)
    assert page.texts["p.badge good"] == "finished"
    assert page.parts["test"].told == ["The test split was not opened."]
    assert (folder / "report.md").read_text().startswith("# run/version_0: finished\n")
    config = folder / "config.yaml"
    tested = command_line("test", "--config", config, "--report", "id", root=False)
    assert tested.code == 0, tested.err
    page = report_of(folder)
    assert page.texts["p.badge good"] == "selesai"
    assert {row["ukuran"] for row in page.rows("test")} >= {"test/loss", "test/token_accuracy"}
    assert 'lang="id"' in page.html
    english = command_line("report", "run", "--root", outcome.root)
    assert (english.code, english.out) == (0, f"report: {folder / 'report.html'}\n")
    assert report_of(folder).texts["p.badge good"] == "finished"


def test_a_test_on_other_rows_is_told_apart_from_the_runs_own(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    targets = ["--targets", '{"test/exact_match": 0.0}', "--generations.test_rows", "all"]
    fitted = command_line("fit", *fit_args, *targets, "--test_at_end", "true")
    assert fitted.code == 0, fitted.err
    rows = [{"question": f"Ibu kota ke-{i}?", "answer": "Jakarta"} for i in range(7)]
    other, config = write_rows(tmp_path / "other.jsonl", rows), fitted.run().path / "config.yaml"
    command = ["test", "--config", config, "--ckpt_path", "best", "--report", "en"]
    train = fit_args[fit_args.index("--data.path") + 1]
    paths = json.dumps({"train": train, "test": str(other)})
    tested = command_line(*command, "--data.path", paths, root=False)
    assert tested.code == 0, tested.err
    page = report_of(fitted.run().path)
    shown = [row for row in page.rows("test") if row["metric"] == "test/exact_match"]
    own, others = fitted.run().read()["results"][-2:]
    assert [row["rows"].split()[0] for row in shown] == [str(own["num_rows"]), "7"]
    assert "others" in shown[1]["rows"] and "others" not in shown[0]["rows"]
    assert [row["counted"].split(" / ")[1] for row in shown] == [str(own["num_rows"]), "7"]
    assert all("–" in row["95 % interval"] for row in shown)  # each of its own answers
    assert "Openings of the test split by this run: 1. Openings with other rows: 1" in page.html
    assert others["metrics"]["test/loss"] != own["metrics"]["test/loss"]
    (listed,) = json.loads(command_line("runs", "--json", "--root", fitted.root).out)
    assert listed["test"]["test/loss"] == own["metrics"]["test/loss"]


def test_a_report_that_cannot_be_written_is_one_line_and_no_failure(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Path:
        raise OSError(28, "No space left \x1b[31m")

    monkeypatch.setattr("fine_tune.report.write.write_report", fail)
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 1, "--report", "en")
    assert outcome.code == 0
    warnings = [line for line in outcome.out.splitlines() if "no report was written" in line]
    assert len(warnings) == 1 and "No space left \\x1b[31m" in warnings[0]
    assert outcome.run().read()["status"] == "finished"


def test_a_failed_run_gets_its_report_and_a_running_one_an_honest_one(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ReportPage] = []

    def look_then_fail(_: Any, trainer: Any, *__: Any) -> None:
        if trainer.global_step == 4:
            seen.append(ReportPage(write_report(Path(trainer.loggers[0].save_dir))))
        if trainer.global_step == 5:
            raise RuntimeError("planted")

    monkeypatch.setattr(LossSpikes, "on_train_batch_end", look_then_fail)
    args = ["--report", "en", "--generations.rows", 2, "--generations.max_new_tokens", 2]
    with pytest.raises(RuntimeError, match="planted"):
        command_line("fit", *fit_args, *args)
    (running,) = seen
    assert running.texts["p.badge note"] == "running"
    assert "still going: 3 of 10 steps" in running.texts["p.lead"]
    assert {row["after"] for row in running.rows("answers")} == {"–"}
    assert running.parts["conclusion"].told[0].startswith("The run has not taken all its steps")
    assert running.parts["analysis"].told[0].startswith("So far: ")
    (folder,) = command_line("--version").root.glob("lightning_logs/run/version_0")
    failed = report_of(folder)
    assert failed.texts["p.badge bad"] == "failed"
    assert "ended with an error at step 5 of 10" in failed.texts["p.lead"]


def test_a_stopped_run_gets_its_report(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Any, trainer: Any, *__: Any) -> None:
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LossSpikes, "on_train_batch_end", stop)
    outcome = command_line("fit", *fit_args, "--report", "en")
    assert outcome.code == 143
    page = report_of(outcome.run().path)
    assert page.texts["p.badge note"] == "stopped"
    assert "stopped at step 4 of 10; everything was saved" in page.texts["p.lead"]
    assert page.parts["commands"].code[1].endswith("--ckpt_path last")


def test_a_killed_run_is_not_called_running(command_line: CommandLine, fit_args: list[str]) -> None:
    outcome = command_line("fit", *fit_args, "--generations.rows", 2)
    run = outcome.run()
    run.update({"status": "running", "results": []})  # as a kill leaves them, mid-line
    for name in ("metrics.csv", "generations.jsonl"):
        text = (run.path / name).read_bytes()
        (run.path / name).write_bytes(text[: len(text) - 25])
    owner = {"pid": 2**22 - 3, "started": 0, "host": socket.gethostname()}
    (run.path / ".owner.json").write_text(json.dumps(owner))
    reported = command_line("report", run.path)
    assert reported.code == 0, reported.err
    page = report_of(run.path)
    assert page.texts["p.badge bad"] == "killed"
    assert "no process has it any more" in page.texts["p.lead"]
    assert "generations.jsonl" in page.texts["p.warning"]
    assert page.parts["commands"].code[1].endswith("--ckpt_path last")


def test_an_empty_run_says_that_it_is_empty(command_line: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "nothing" / "version_0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    outcome = command_line("report", "nothing", "--root", tmp_path)
    assert outcome.code == 0, outcome.err
    page = report_of(folder)
    assert page.texts["p.badge note"] == "empty"
    assert "Nothing was trained here" in page.texts["p.lead"]
    assert page.parts["conclusion"].told[0].startswith("Too little was logged")
    assert not page.parts["curves"].drawings


def test_hostile_rows_names_and_words_do_nothing(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "=cmd()<script>alert(2)<"
    folder.mkdir()
    rows = [{"question": f"{text} {i}", "answer": text} for i in range(6) for text in HOSTILE]
    file = write_rows(folder / "rows.jsonl", rows)
    path = fit_args.index("--data.path") + 1
    args = [*fit_args[:path], str(file), *fit_args[path + 1 :], "--report", "en"]
    args += [
        "--trainer.max_steps",
        "1",
        "--generations.rows",
        "48",
        "--data.split",
        "{validation: 20}",
    ]
    args += ["--generations.max_new_tokens", "2", "--purpose", " ".join(HOSTILE)]
    args += ["--licences", json.dumps({str(file): HOSTILE[0]})]
    outcome = command_line("fit", *args)
    assert outcome.code == 0, outcome.err
    run = outcome.run()
    page = report_of(run.path)
    assert page.tags["script"] == page.tags["img"] == len(page.handlers) == 0
    assert page.tags["h1"] == 1 and page.tags["main"] == 1
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert "\x1b" not in page.html and "\x07" not in page.html
    asked = [row["asked"] for row in page.rows("answers")]
    expected = {row["expected"] for row in page.rows("answers")}
    assert len(asked) == 16
    assert expected & {HOSTILE[0], HOSTILE[3], "\\x1b]0;owned\\x07\\x1b[31mred"}
    cells = [cell for part in page.parts.values() for t in part.tables for row in t for cell in row]
    assert not [cell for cell in cells if cell.lstrip().startswith("=")]
    assert page.rows("data")[0]["licence"] == HOSTILE[0]
    assert "{{ 7 * 7 }} {% raw %}" in page.texts["p.lead"]
    text = (run.path / "report.md").read_text()
    assert "\x1b" not in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
    assert kinds >= {"table_open", "fence", "heading_open", "text"}
    assert not kinds & {"html_inline", "link_open", "image", "code_inline"}
    html = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert html == ["<!-- a report of fine_tune -->"]  # our own mark, and nothing of the rows


def test_a_hostile_path_does_not_reach_the_terminal(
    command_line: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "a\x1b[31mb"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    outcome = command_line("report", folder)
    assert outcome.code == 0
    assert "\x1b" not in outcome.out and "a\\x1b[31mb" in outcome.out


def test_two_runs_stand_side_by_side_with_their_differences(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    args = [*fit_args, "--trainer.max_steps", "2"]
    first = command_line("fit", *args)
    second = command_line("fit", *args, "--model.optimizer.lr", "5e-4", "--data.batch_size", "4")
    assert second.code == 0, second.err
    outcome = command_line("report", "run/0", "run/1", "--root", first.root)
    assert outcome.code == 0, outcome.err
    page = ReportPage(first.run().path / "comparison.html")
    names = ["A: run/version_0", "B: run/version_1"]
    differ = {row["setting"]: [row[name] for name in names] for row in page.rows("settings")}
    assert differ == {
        "data.batch_size": ["8", "4"],
        "model.optimizer.lr": ["0.001", "0.0005"],
    }
    assert page.html.count("class=differs") >= len(differ)
    results = {row[""]: [row[name] for name in names] for row in page.rows("results")}
    assert results["step"] == ["2 / 2", "2 / 2"]
    for name, run in zip(names, (first.run(), second.run(version=1)), strict=True):
        loss = run.read()["results"][-1]["metrics"]["val/loss"]
        assert results["val/loss"][names.index(name)].startswith(f"{loss:.4g} (")
    assert page.parts["curves"].drawings == 4


def test_mistakes_are_told_in_one_line(command_line: CommandLine, tmp_path: Path) -> None:
    nobody = command_line("report", "nobody", "--root", tmp_path)
    assert (nobody.code, nobody.out) == (2, "")
    assert nobody.err.startswith("error: run: no run 'nobody'")
    (tmp_path / "run.json").write_text("{}")
    every = command_line("report", tmp_path, "--every", 0)
    assert (every.code, every.err) == (2, "error: --every: must be at least 1, got 0\n")
    (tmp_path / "report.md").mkdir()
    blocked = command_line("report", tmp_path)
    assert blocked.code == 2 and "the report cannot be written" in blocked.err
    (tmp_path / "file").touch()
    no_folder = command_line("report", tmp_path, "--output", tmp_path / "file")
    assert no_folder.code == 2 and "the report cannot be written" in no_folder.err
    seven = command_line("report", *[tmp_path] * 7)
    assert seven.code == 2 and "at most 6 stand side by side" in seven.err


def test_ten_thousand_logged_steps_are_drawn_in_five_seconds_under_two_megabytes(
    tmp_path: Path,
) -> None:
    draw = random.Random(0)
    rows = [
        f"{step},{step / 1000},{3 + draw.random() if step != 5678 else 77.5},1e-4,"
        f"{draw.random()},9000,{3 + draw.random()},0.5,0.6"
        for step in range(1, 10_001)
    ]
    head = "step,epoch,train/loss,lr,grad_norm,perf/tokens_per_second,val/loss,"
    head += "perf/memory_allocated_gib,perf/memory_reserved_gib"
    (tmp_path / "metrics.csv").write_text("\n".join([head, *rows]))
    events = [
        {"step": s, "kind": k, "event": "e"}
        for s, k in ((3000, "out_of_memory"), (7000, "fallback"))
    ]
    events += [{"step": s, "kind": "nearly_full", "event": "e"} for s in range(1, 10_001)]
    record = {"status": "finished", "step": 10_000, "num_steps": 10_000, "events": events}
    record |= {"best_step": 4321, "best_score": 3.0}
    record["starts"] = [{"from_step": 0}, {"from_step": 5000}]
    (tmp_path / "run.json").write_text(json.dumps(record))
    start = time.perf_counter()
    file = write_report(tmp_path)
    assert time.perf_counter() - start < 5
    assert file.stat().st_size < 2_000_000
    page = ReportPage(file)
    assert [row["step"] for row in page.rows("steps")][-1] == "10,000"
    assert len(page.rows("steps")) == 100
    curves = page.parts["curves"]
    assert {"Out of memory", "Precision fallback", "Resumed"} <= set(curves.chart_texts)
    assert {"80", "60", "50"} & set(curves.chart_texts)  # the one spike is drawn
    evaluated = [row["step"] for row in page.rows("evaluation")]
    assert len(evaluated) <= 100 and {"1", "4,321", "10,000"} <= set(evaluated)
    assert f"{len(evaluated)} of 10,000 evaluations" in page.html
    assert [line for line in curves.told if line.startswith("Resumed")] == [
        "Resumed: at step 5,000"
    ]


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    code = (
        "import sys; from fine_tune.__main__ import main; assert main(['report', sys.argv[1]]) == 0; "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr


def test_energy_is_counted_over_all_starts_and_co2e_needs_a_factor(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = iter(range(0, 10**9, 7_200_000))  # each reading, 2 Wh more
    monkeypatch.setattr(
        "fine_tune.callbacks.run_record.energy_meter", lambda _: EnergyMeter(lambda: next(counter))
    )
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 2)
    run = outcome.run()
    command_line("report", run.path)
    facts = report_of(run.path).parts["cost"].facts
    assert facts["Energy"] == "2 Wh of the GPUs alone, as NVML counts"
    assert facts["CO2e"].startswith("not known: no grid factor was given")
    config = run.path / "config.yaml"
    args = ["--ckpt_path", "last", "--trainer.max_steps", 4, "--grid_gco2e_per_kwh", 500]
    longer = command_line("fit", "--config", config, *args, "--report", "en", root=False)
    assert longer.code == 0, longer.err
    command_line("report", run.path, "--grid_gco2e_per_kwh", 500)
    facts = report_of(run.path).parts["cost"].facts
    assert facts["Energy"].startswith("4 Wh of the GPUs alone, as NVML counts; of a start that was")
    assert facts["Energy"].endswith("killed nothing is counted, neither here nor in CO2e")
    assert facts["CO2e"] == "2 g, at the given 500 g CO2e per kWh of the grid"
    assert any(
        line.startswith("Resumed: at step 2") for line in report_of(run.path).parts["curves"].told
    )


def test_a_counter_of_energy_that_fails_at_the_end_costs_its_number_alone(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0])  # then the GPU is lost
    monkeypatch.setattr(
        "fine_tune.callbacks.run_record.energy_meter", lambda _: EnergyMeter(lambda: next(readings))
    )
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", 1)
    assert outcome.code == 0, outcome.err
    record = outcome.run().read()
    assert record["status"] == "finished" and "energy" not in record


def analysed(command_line: CommandLine, args: list[str], *more: object) -> tuple[str, str]:
    """Train, and return the main finding and the conclusion."""
    constant = ["--model.lr_scheduler", "constant", "--trainer.val_check_interval", 5]
    outcome = command_line("fit", *args, *constant, *more, "--report", "en")
    assert outcome.code == 0, outcome.err
    page = report_of(outcome.run().path)
    return page.parts["analysis"].told[0], page.parts["conclusion"].told[0]


def test_a_run_that_overfits_is_told_so(command_line: CommandLine, fit_args: list[str]) -> None:
    more = ("--data.epochs", 20, "--model.optimizer.lr", 2e-2, "--data.max_rows", "{train: 8}")
    finding, verdict = analysed(command_line, fit_args, *more)
    assert "Validation loss was best at step" in finding and "overfitting" in finding
    assert verdict.startswith("The run overfitted: take the best checkpoint")


@pytest.mark.parametrize(
    ("optimizer", "rate", "told"),
    [
        ("AdamW", 5, "Training loss rose again, beyond its noise: from 7.1"),
        ("SGD", 100, "was no finite number, in the safest precision either"),
    ],
)
def test_a_run_that_diverges_is_told_so(
    command_line: CommandLine, fit_args: list[str], optimizer: str, rate: float, told: str
) -> None:
    more = ["--data.epochs", 4, "--model.optimizer.class_path", f"torch.optim.{optimizer}"]
    outcome = command_line("fit", *fit_args, *more, "--model.optimizer.lr", rate, "--report", "en")
    page = report_of(outcome.run().path)
    assert told in page.parts["analysis"].told[0]
    assert page.parts["conclusion"].told[0].startswith("The run diverged: lower model.optimizer.lr")


def test_a_run_that_still_improves_is_told_so(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    more = ("--data.epochs", 8, "--model.optimizer.lr", 2e-4)
    finding, verdict = analysed(command_line, fit_args, *more)
    assert "Validation loss fell from" in finding and finding.endswith("Still improving.")
    assert verdict.startswith("The run was still improving when it ended: more epochs")


def test_a_run_that_learns_nothing_is_told_so(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    more = ("--data.epochs", 8, "--model.optimizer.lr", 1e-9)
    finding, verdict = analysed(command_line, fit_args, *more)
    assert finding.startswith("No learning shows: training loss began at")
    assert verdict.startswith("The run did not learn, as far as its losses tell")


def test_a_report_replaces_a_report_and_nothing_else(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run().path
    mine = tmp_path / "notes"
    mine.mkdir()
    for _ in range(2):
        assert command_line("report", run, "--output", mine).code == 0
    (mine / "report.md").write_text("my own words")
    refused = command_line("report", run, "--output", mine)
    assert refused.code == 2 and "report.md' is no report of this project" in refused.err
    assert (mine / "report.md").read_text() == "my own words"
