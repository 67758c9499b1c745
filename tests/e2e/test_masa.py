"""The pipeline from texts to an aligned model: each stage names the one before, and the chain is known."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import REPOSITORY

STAGES = ("pretrain", "sft", "dpo")
DATA = {
    "make-qa": "questions",
    "make-preferences": "preferences",
    "train-tokenizer": "tokenizer",
}


def run(folder: Path, *line: object) -> str:
    """Run a command line in a folder that sees the project's files where a user's checkout has them."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-m", "fine_tune", *map(str, line)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("configs", "fine_tune"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def chain(folder: Path, **more: list[object]) -> None:
    """Run all stages, each with more flags."""
    for verb, name in DATA.items():
        run(folder, verb, "--config", f"configs/masa/{name}.yaml", *more.get(verb, []))
    for stage in STAGES:
        line = ["fit", "--config", f"configs/masa/{stage}.yaml", *more.get(stage, [])]
        run(folder, *line, "--trainer.enable_progress_bar", "false")


def result(folder: Path, name: str) -> dict[str, float]:
    record = json.loads(
        (folder / "lightning_logs" / name / "version_0" / "run.json").read_text("utf-8")
    )
    (test,) = [r for r in record["results"] if r["split"] == "test"]
    return dict(test["metrics"])


def test_the_stages_find_one_another(folder: Path) -> None:
    brief: list[object] = ["--trainer.max_steps", 2, "--data.max_rows", 200, "--report", "null"]
    quick: list[object] = [*brief, "--generations.rows", 0, "--generations.test_rows", 2]
    chain(
        folder,
        **{
            "make-qa": ["--corpus_texts", 800],
            "make-preferences": ["--pairs", 200],
            "pretrain": [*brief, "--generations.rows", 0],
            "sft": quick,
            "dpo": quick,
        },
    )
    lines = run(folder, "lineage", "masa_dpo").splitlines()
    runs = [line.strip().split(":")[0] for line in lines if "/version_0: " in line]
    assert runs == [f"masa_{stage}/version_0" for stage in ("dpo", "sft", "pretrain")]
    assert any("bpe of 2000 from corpus.txt SHA-256" in line for line in lines)
    larger = [
        "--config",
        "configs/masa/pretrain.yaml",
        "--config",
        "configs/masa/150m/pretrain.yaml",
    ]
    here = ["--data.path", "masa_data/corpus.txt", "--model.tokenizer", "masa_data/tokenizer"]
    planned = run(folder, "plan", *larger, *here, "--gpu_memory_gib", 24, *brief[:4])
    assert "fits in 24 GiB" in planned


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_pipeline_answers_held_out_questions(folder: Path) -> None:
    start = time.monotonic()
    chain(folder)
    minutes = (time.monotonic() - start) / 60
    pretrained, tuned, aligned = (result(folder, f"masa_{stage}") for stage in STAGES)
    told = f"{minutes:.1f} minutes; {pretrained}; {tuned}; {aligned}"
    print(told)
    assert pretrained["test/perplexity"] < 20 and pretrained["test/loss"] < 1.5, told
    assert tuned["test/exact_match"] > 0.8, told
    assert aligned["test/exact_match"] > tuned["test/exact_match"] - 0.02, told
    assert aligned["test/another_answer"] < 0.2, told
