"""Several runs on one page: what is read of each is told of each, and so is what cannot be read."""

import shutil
from pathlib import Path

import pytest
from report_page import ReportPage

from fine_tune.report.write import write_comparison

HEAD = "step,train/loss,val/loss,lr,perf/memory_allocated_gib"
NAMES = ("A: run/version_0", "B: run/version_1")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in their learning rate and in what came of it."""
    folders = [tmp_path / "run" / f"version_{version}" for version in range(2)]
    for folder, loss, rate in zip(folders, (1.5, 1.25), (0.1, 0.2), strict=True):
        folder.mkdir(parents=True)
        rows = [HEAD, f"1,3.0,,{rate},0.5", f"2,{loss},2.5,{rate},0.6902"]
        (folder / "metrics.csv").write_text("\n".join(rows))
        (folder / "run.json").write_text('{"status": "finished", "step": 2, "num_steps": 2}')
        (folder / "data.json").write_text("{}")
        (folder / "config.yaml").write_text(f"model: {{lr: {rate}}}\ndata: {{seed: 1}}\n")
    return folders


def test_the_peak_memory_has_its_unit(runs: list[Path]) -> None:
    results = {row[""]: row for row in ReportPage(write_comparison(runs)).rows("results")}
    assert [results["Peak memory"][name] for name in NAMES] == ["0.6902 GiB"] * 2


def test_every_chart_is_told_in_words_for_each_run(runs: list[Path]) -> None:
    html = write_comparison(runs).read_text("utf-8")
    told = "A: from 3 to 1.5, lowest 1.5, highest 3. B: from 3 to 1.25, lowest 1.25, highest 3."
    assert f"- training loss: {told}" in (runs[0] / "comparison.md").read_text("utf-8")
    assert told in html and '. "><fig' not in html.replace("\n", "")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("data.json", "Damaged or cut off, used as far as they can be read: data.json."),
        ("-metrics.csv", "Not in the run folder: metrics.csv. What they would tell is missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_run(
    runs: list[Path], damage: str, told: str
) -> None:
    assert "class=warning" not in write_comparison(runs).read_text("utf-8")
    file = runs[1] / damage.removeprefix("-")
    file.unlink() if damage.startswith("-") else file.write_text("{")
    warned = ReportPage(write_comparison(runs)).texts["p.warning"]
    assert warned.startswith(f"{NAMES[1]}: {told}") and NAMES[0] not in warned


@pytest.mark.parametrize("config", ["{", "- a", ""])
def test_settings_that_cannot_be_read_are_not_compared(runs: list[Path], config: str) -> None:
    lost = "The settings of {} could not be read: they are not compared."
    third = runs[0].with_name("version_2")
    shutil.copytree(runs[0], third)
    (runs[1] / "config.yaml").write_text(config)
    part = ReportPage(write_comparison([*runs, third])).parts["settings"]
    assert part.told == [lost.format(NAMES[1]), "All settings are the same."]
    (third / "config.yaml").write_text("model: {lr: 0.3}\ndata: {seed: 1}\n")
    page = ReportPage(write_comparison([*runs, third]))
    assert page.parts["settings"].told == [lost.format(NAMES[1])]
    assert [list(row.values()) for row in page.rows("settings")] == [["model.lr", "0.1", "0.3"]]
    assert ReportPage(write_comparison(runs)).parts["settings"].told == [lost.format(NAMES[1])]
    (runs[0] / "config.yaml").unlink()
    told = ReportPage(write_comparison(runs)).parts["settings"].told
    assert told == [lost.format(name) for name in NAMES]
