"""Every item a report has to hold, each held against ``metrics.csv`` and ``config.yaml``."""

import json
from pathlib import Path
from typing import Any

import yaml
from report_page import ReportPage

from fine_tune.runs.run_folder import RunFolder


def check_every_item(run: RunFolder, metrics: list[dict[str, str]]) -> None:
    """Hold the report of a run of ``phi2_xsum.yaml``'s schedule against what the run wrote."""
    page = ReportPage(run.path / "report.html")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    record, audit = run.read(), json.loads((run.path / "data.json").read_text())
    check_setup(page, config, record)
    check_data(page, config, audit)
    check_steps(page, metrics)
    check_evaluations(page, metrics, record)
    check_outcome(page, config, record)
    check_cost_and_commands(page, run, record)
    check_analysis(page, metrics)


def check_setup(page: ReportPage, config: dict[str, Any], record: dict[str, Any]) -> None:
    facts, model = page.parts["setup"].facts, config["model"]["init_args"]
    data, lora = config["data"]["init_args"], model["lora"]["init_args"]
    assert page.texts["p.lead"].startswith(config["purpose"])
    assert facts["Epochs"] == str(data["epochs"]) == "1"
    assert facts["Total steps"] == str(record["num_steps"]) == "625"
    assert facts["Rows per split"] == "train 5,000, validation 4, test 4"
    assert facts["Batch × accumulation"].startswith(f"{data['batch_size']} rows per optimizer step")
    assert "micro-batches of at most 1,024 padded tokens" in facts["Batch × accumulation"]
    assert float(facts["Learning rate"]) == model["optimizer"]["init_args"]["lr"] == 2e-4
    assert facts["Scheduler"] == f"{model['lr_scheduler']}, {model['warmup_steps']} warm-up steps"
    assert (
        facts["Optimizer"].startswith("PagedAdamW8bit")
        and "clipped at norm 1" in facts["Optimizer"]
    )
    assert facts["Validation interval"] == "every 500 steps"
    assert facts["Precision"] == config["trainer"]["precision"]
    assert facts["Quantization"] == model["quantization"] == "nf4"
    assert (
        facts["Compute dtype"]
        == {"32-true": "float32", "bf16-mixed": "bfloat16"}[facts["Precision"]]
    )
    assert (
        (facts["LoRA r"], facts["LoRA alpha"])
        == (str(lora["r"]), str(lora["lora_alpha"]))
        == ("16", "32")
    )
    assert facts["LoRA dropout"] == str(lora["lora_dropout"]) == "0.05"
    assert facts["LoRA targets"] == ", ".join(sorted(lora["target_modules"]))
    trained, total = record["model"]["trained"], record["model"]["parameters"]
    assert 0 < trained < total
    assert (
        facts["Trainable share"]
        == f"{100 * trained / total:.2f} % ({trained:,} of {total:,} weights)"
    )
    assert facts["Device"] == record["environment"]["devices"][0]
    assert f"torch {record['environment']['packages']['torch']}" in facts["Packages"]
    assert facts["Python"] == record["environment"]["python"]


def check_data(page: ReportPage, config: dict[str, Any], audit: dict[str, Any]) -> None:
    sources = page.rows("data")
    assert [row["source"] for row in sources] == list(config["data"]["init_args"]["path"].values())
    assert {row["licence"] for row in sources} == {config["licences"]["all"]} == {"MIT"}
    splits = page.rows("data", 1)
    assert [(row["split"], row["rows"]) for row in splits] == [
        ("train", "5,000"),
        ("validation", "4"),
        ("test", "4"),
    ]
    assert [float(row["median"]) for row in splits] == [
        s["length"]["median"] for s in audit["splits"].values()
    ]
    histogram = page.rows("data", 2)
    assert [int(row["rows"].replace(",", "")) for row in histogram] == audit["length"]["histogram"][
        "counts"
    ]
    assert all(("█" in row["share"]) == (row["rows"] != "0") for row in histogram)
    facts = page.parts["data"].facts
    assert facts["Truncation"].startswith(
        "0.0 % of the rows cut, 0.0 % of the supervised tokens lost"
    )
    assert (
        facts["Repeated training rows"]
        == f"{audit['repeated_rows']['repeated']:,} exactly, {audit['repeated_rows']['near']:,} nearly"
    )
    leaked = audit["leakage"]["between"]["train/validation"]["validation"]
    assert facts["Leakage train / validation"].startswith(f"{leaked['exact']} rows of validation")
    assert leaked["exact"] == 4


def check_steps(page: ReportPage, metrics: list[dict[str, str]]) -> None:
    logged = {int(row["step"]): row for row in metrics if row["train/loss"]}
    rows = page.rows("steps")
    assert [int(row["step"]) for row in rows] == [100, 200, 300, 400, 500, 600, 625]
    assert [row["epoch"] for row in rows] == [
        "0.16",
        "0.32",
        "0.48",
        "0.64",
        "0.80",
        "0.96",
        "1.00",
    ]
    for row in rows:
        of_step = logged[int(row["step"])]
        assert row["training loss"] == f"{float(of_step['train/loss']):.4g}"
        assert row["learning rate"] == f"{float(of_step['lr']):.2e}"
        assert row["gradient norm"] == f"{float(of_step['grad_norm']):.4g}"
    charts = page.parts["curves"]
    assert charts.charts == [
        "Loss",
        "Learning rate",
        "Gradient norm, before clipping",
        "Tokens per second",
        "Memory (GiB)",
    ]
    assert charts.drawings == len(charts.charts)


def check_evaluations(
    page: ReportPage, metrics: list[dict[str, str]], record: dict[str, Any]
) -> None:
    measured = {row["step"]: row for row in metrics if row["val/loss"]}
    rows = page.rows("evaluation")
    assert [row["step"] for row in rows] == list(measured) == ["500", "625"]
    for row in rows:
        of_step = measured[row["step"]]
        assert row["evaluation loss"] == f"{float(of_step['val/loss']):.4g}"
        assert row["seconds"] == f"{float(of_step['perf/evaluation_seconds']):.4g}"
        gap = float(row["training loss then"]) - float(row["evaluation loss"])
        assert abs(float(row["gap train − validation"]) - gap) < 2e-3
    (best,) = page.parts["evaluation"].told
    assert best == f"Best step: {record['best_step']}, with val/loss {record['best_score']:.4g}."


def check_outcome(page: ReportPage, config: dict[str, Any], record: dict[str, Any]) -> None:
    result = next(r for r in record["results"] if r["split"] == "test")
    rows = {row["metric"]: row for row in page.rows("test")}
    assert set(rows) == set(result["metrics"])
    for name in ("test/loss", "test/token_accuracy"):
        low, high = result["intervals"][name]
        assert low < result["metrics"][name] < high
        assert rows[name]["95 % interval"] == f"{low:.4g} – {high:.4g}"
    assert rows["test/exact_match"]["counted"].endswith(" / 4")
    assert " – " in rows["test/exact_match"]["95 % interval"]
    told = page.parts["targets"].told
    assert len(told) == len(config["targets"]) == 2
    assert told[0].startswith("val/loss 100: reached with") and told[1].startswith(
        "test/loss 0.001: missed with"
    )
    assert "1 of 2 targets reached." in page.parts["conclusion"].told
    answers = page.rows("answers")
    assert len(answers) == config["generations"]["rows"] == 2
    assert list(answers[0]) == ["asked", "expected", "before", "after"]
    assert answers[0]["expected"] == "dua 0" and "satu 0" in answers[0]["asked"]


def check_cost_and_commands(page: ReportPage, run: RunFolder, record: dict[str, Any]) -> None:
    facts = page.parts["cost"].facts
    assert facts["Tokens trained on"] == f"{record['num_tokens']['train']:,}"
    assert (
        facts["Time of training"] != "not recorded" and facts["of it evaluations"] != "not recorded"
    )
    assert facts["Peak memory"].endswith(" GiB") and float(facts["Peak memory"].split()[0]) > 0.1
    assert facts["Energy"] == facts["CO2e"] == "not measured"
    config, commands = run.path / "config.yaml", page.parts["commands"].code
    assert commands[:3] == [
        f"cd {Path.cwd()} && python -m fine_tune fit --config {config}",
        f"cd {Path.cwd()} && python -m fine_tune fit --config {config} --ckpt_path last --data.epochs N",
        f"cd {Path.cwd()} && python -m fine_tune test --config {config} --ckpt_path best",
    ]
    assert (
        "python -m fine_tune fit --config" in commands[3]
        and "configs/phi2_xsum.yaml" in commands[3]
    )


def check_analysis(page: ReportPage, metrics: list[dict[str, str]]) -> None:
    main, *others = page.parts["analysis"].told
    first, last = (f"{float(row['val/loss']):.4g}" for row in metrics if row["val/loss"])
    assert first in main and last in main
    assert any(line.startswith("Training loss fell from") for line in others)
    assert any("a gap train − validation of" in line for line in others)
    assert any(line.startswith("Gradients ") for line in others)
    assert page.parts["conclusion"].told[0].startswith("The run ")
