"""``report``: its flags do what they say."""

from pathlib import Path

import pytest
from harness import CommandLine
from report_page import ReportPage


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
