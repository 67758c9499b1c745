"""``analyze`` prints what there is to know of the data; ``fit`` keeps the same facts and the settings it chose."""

import json
from pathlib import Path

import yaml
from harness import CommandLine, write_rows


def analyze_args(fit_args: list[str], tmp_path: Path) -> list[str]:
    return ["analyze", *fit_args, "--trainer.default_root_dir", str(tmp_path)]


def test_analyze_prints_counts_and_shows_rows(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    outcome = command_line(*analyze_args(fit_args, tmp_path), "--show", "2")
    assert outcome.code == 0, outcome.err
    for text in ("train", "sealed: ", "tokens per row", "splits side by side", "drift of test"):
        assert text in outcome.out
    assert "data.max_length: 128 (longest training row" in outcome.out
    assert "recommended for fewer than 10,000 rows" in outcome.out
    assert "Berapa 0 + 0?« 0»[stop <eos>]" in outcome.out
    assert not (tmp_path / "lightning_logs" / "run").exists()


def test_show_gives_training_rows_only(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    outcome = command_line(*analyze_args(fit_args, tmp_path), "--show", "100")
    asked = [line for line in outcome.out.splitlines() if line.startswith("Berapa ")]
    audit = command_line("fit", *fit_args, "--trainer.max_steps", "1").run().path / "data.json"
    assert len(asked) == json.loads(audit.read_text())["rows"]["train"]


def test_empty_completions_are_counted_here_and_refused_by_fit(
    command_line: CommandLine, fit_args: list[str], rows_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows[4]["answer"] = rows[7]["answer"] = ""
    write_rows(rows_file, rows)
    counted = command_line(*analyze_args(fit_args, tmp_path))
    assert counted.code == 0, counted.err
    assert "2 rows: fit refuses them" in counted.out
    refused = command_line("fit", *fit_args)
    assert refused.code == 2
    assert "rows.jsonl:5: the completion is empty" in refused.err
    assert "--data.empty_completions drop" in refused.err
    dropped = command_line(
        "fit", *fit_args, "--data.empty_completions", "drop", "--trainer.max_steps", "1"
    )
    assert dropped.code == 0, dropped.err
    assert "2 rows with an empty answer left out" in dropped.out
    assert sum(dropped.run().read()["num_rows"].values()) == 38


def test_control_characters_in_rows_stay_text(
    command_line: CommandLine, fit_args: list[str], rows_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    write_rows(rows_file, [{**row, "question": f"\x1b[2J[bold]{row['question']}"} for row in rows])
    outcome = command_line(*analyze_args(fit_args, tmp_path), "--show", "1")
    assert "\x1b" not in outcome.out
    assert "[bold]" in outcome.out


def test_a_mistake_is_one_line(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    outcome = command_line(*analyze_args(fit_args, tmp_path), "--data.group_by", "qestion")
    assert outcome.code == 2
    assert "data.group_by" in outcome.err
    assert "did you mean 'question'?" in outcome.err


def test_chosen_settings_are_said_saved_and_used_again(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    at = fit_args.index("--data.batch_size")
    args = [*fit_args[:at], *fit_args[at + 2 :], "--checkpoint.every", "2"]
    first = command_line("fit", *args, "--trainer.max_steps", "2")
    assert first.code == 0, first.err
    assert "data.batch_size: 8 (95 % of the training rows have up to" in first.out
    config = first.run().path / "config.yaml"
    saved = yaml.safe_load(config.read_text())
    data, model = saved["data"]["init_args"], saved["model"]["init_args"]
    assert (data["max_length"], data["batch_size"], data["max_tokens_per_micro_batch"]) == (
        128,
        8,
        1024,
    )
    assert model["gradient_checkpointing"] is False
    again = command_line(
        *("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "4"), root=False
    )
    assert again.code == 0, again.err
    assert "data.batch_size: 8 (" not in again.out  # nothing is chosen anew
    assert "tokens from the cache" in again.out
    assert [row["step"] for row in again.metrics()] == ["1", "2", "3", "4"]


def test_what_the_user_says_goes_first(command_line: CommandLine, fit_args: list[str]) -> None:
    own = ["--data.max_length", "40", "--model.gradient_checkpointing", "true"]
    outcome = command_line("fit", *fit_args, *own, "--trainer.max_steps", "1")
    assert outcome.code == 0, outcome.err
    saved = yaml.safe_load((outcome.run().path / "config.yaml").read_text())
    assert saved["data"]["init_args"]["max_length"] == 40
    assert saved["data"]["init_args"]["max_tokens_per_micro_batch"] == 320
    assert saved["model"]["init_args"]["gradient_checkpointing"] is True
    assert "data.max_length: " not in outcome.out
