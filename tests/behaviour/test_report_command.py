"""``report``: its flags do what they say."""

import json
from pathlib import Path

import pytest
from harness import CommandLine
from report_page import ReportPage

from fine_tune.report.write import write_report


def logged_every_ten(folder: Path, last: int = 205) -> Path:
    """A run folder with a row of metrics every ten steps and one of the last step."""
    folder.mkdir()
    rows = [f"{step},2.5" for step in (*range(10, last, 10), last)]
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss", *rows]))
    (folder / "run.json").write_text('{"status": "finished"}')
    (folder / "config.yaml").write_text("trainer: {log_every_n_steps: 10}")
    return folder


@pytest.mark.parametrize(("every", "apart"), [(7, 10), (10, 10), (25, 30), (1000, 1000)])
def test_the_table_of_steps_keeps_to_logged_steps_and_its_note_says_so(
    command_line: CommandLine, tmp_path: Path, every: int, apart: int
) -> None:
    folder = logged_every_ten(tmp_path / "run")
    assert command_line("report", folder, "--every", every).code == 0
    page = ReportPage(folder / "report.html")
    steps = [int(row["step"]) for row in page.rows("steps")]
    assert steps == [*range(apart, 205, apart), 205]
    note = f"Steps at multiples of {apart:,} and the last one: {len(steps)} of 21 logged"
    assert note in page.html


def test_the_report_is_written_in_the_language_asked_for(
    command_line: CommandLine, tmp_path: Path
) -> None:
    folder = logged_every_ten(tmp_path / "run")
    assert command_line("report", folder, "--language", "id").code == 0
    page = ReportPage(folder / "report.html")
    assert 'lang="id"' in page.html and page.texts["p.badge good"] == "selesai"
    assert [row["langkah"] for row in page.rows("steps")][-1] == "205"
    assert (folder / "report.md").read_text("utf-8").splitlines()[0].endswith(": selesai")
    with pytest.raises(SystemExit) as refused:
        command_line("report", folder, "--language", "fr")
    assert refused.value.code == 2


def test_the_axes_of_an_indonesian_report_have_a_decimal_comma(
    command_line: CommandLine, tmp_path: Path
) -> None:
    folders = [logged_every_ten(tmp_path / name) for name in ("a", "b")]
    for (
        folder
    ) in folders:  # losses so far apart are drawn logarithmically, alone and in no comparison
        rows = ["step,train/loss,lr", "1,90.5,0.00055", "2,0.52,0.00065"]
        (folder / "metrics.csv").write_text("\n".join(rows))
    assert command_line("report", folders[0], "--language", "id").code == 0
    assert command_line("report", *folders, "--language", "id").code == 0
    for name in ("report", "comparison"):
        texts = ReportPage(folders[0] / f"{name}.html").parts["curves"].chart_texts
        assert "1,2" in texts and "0,0006" in texts
        assert not [text for text in texts if "." in text]


def test_the_cores_of_a_cpu_are_counted_in_the_reports_language(
    command_line: CommandLine, tmp_path: Path
) -> None:
    folder = logged_every_ten(tmp_path / "run")
    record = {
        "environment": {"devices": ["A 3 cores CPU, 2 cores (7 GiB)", "NVIDIA H100 (80 GiB)"]}
    }
    (folder / "run.json").write_text(json.dumps(record))
    assert command_line("report", folder, "--language", "id").code == 0
    facts = ReportPage(folder / "report.html").parts["setup"].facts
    assert facts["Perangkat"] == "A 3 cores CPU, 2 inti (7 GiB), NVIDIA H100 (80 GiB)"
    assert command_line("report", folder).code == 0
    facts = ReportPage(folder / "report.html").parts["setup"].facts
    assert facts["Device"] == "A 3 cores CPU, 2 cores (7 GiB), NVIDIA H100 (80 GiB)"


@pytest.mark.parametrize("grid", ["-1", "nan", "inf"])
def test_a_grid_factor_that_is_none_is_refused(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, grid: str
) -> None:
    folder, flag = logged_every_ten(tmp_path / "run"), f"--grid_gco2e_per_kwh={grid}"
    reported = command_line("report", folder, flag)
    assert reported.code == 2 and not (folder / "report.html").exists()
    fitted = command_line("fit", *fit_args, flag)
    assert fitted.code == 2 and not list(tmp_path.glob("lightning_logs/run/*"))
    told = "grid_gco2e_per_kwh: must be grams of CO2e per kWh, from 0 up; got"
    assert told in reported.err
    assert told in fitted.err or "grid_gco2e_per_kwh: Expected a float" in fitted.err


@pytest.mark.parametrize(("starts", "told"), [(1, False), (2, True)])
def test_energy_over_several_starts_says_what_it_leaves_out(
    tmp_path: Path, starts: int, told: bool
) -> None:
    folder = logged_every_ten(tmp_path / "run")
    record = {"status": "finished", "energy": {"watt_hours": 2.0}, "starts": [{}] * starts}
    (folder / "run.json").write_text(json.dumps(record))
    energy = ReportPage(write_report(folder)).parts["cost"].facts["Energy"]
    assert energy.startswith("2 Wh of the GPUs alone")
    assert ("of a start that was killed nothing is counted" in energy) == told


@pytest.mark.parametrize(("flag", "value"), [("--every", 10), ("--grid_gco2e_per_kwh", 0)])
def test_what_is_for_one_run_is_refused_for_several(
    command_line: CommandLine, tmp_path: Path, flag: str, value: int
) -> None:
    folders = [logged_every_ten(tmp_path / name) for name in ("a", "b")]
    refused = command_line("report", *folders, flag, value)
    told = f"error: {flag}: is for the report of one run, and 2 are given; leave it out\n"
    assert (refused.code, refused.out, refused.err) == (2, "", told)
    assert not list(tmp_path.rglob("*.html"))
