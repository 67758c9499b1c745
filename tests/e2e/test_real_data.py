"""Real rows to the end with the real command line: fit, then test on the held-out part."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPOSITORY, TOKENIZER, write_rows

from fine_tune.runs.run_folder import RunFolder

DATA = Path(os.environ.get("FINE_TUNE_DATA", "/nowhere"))
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
CASES = {
    "gsm8k": ("gsm8k_train.jsonl", "{question}\n", "{answer}"),
    "dialogsum": ("dialogsum_dev.jsonl", "Summarize:\n{dialogue}\n\nSummary:", " {summary}"),
    "facqa": ("facqa_id_train.jsonl", "{context}\nPertanyaan: {question}\nJawaban:", " {answer}"),
    "chat": ("chat.jsonl", None, None),
}

EPOCHS = {"gsm8k": "1", "dialogsum": "6", "facqa": "2", "chat": "3"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not DATA.is_dir(),
        reason="real rows are not shipped: their licences differ; FINE_TUNE_DATA names a folder of them",
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_real_rows_from_raw_to_tested(case: str, tmp_path: Path) -> None:
    name, prompt, completion = CASES[case]
    path = DATA / name if prompt else chat_rows(tmp_path / name)
    args = [
        *("--name", case, "--trainer.default_root_dir", str(tmp_path)),
        *("--model", "fine_tune.modules.SFT", "--model.from_config", json.dumps(MODEL)),
        *("--model.tokenizer", str(TOKENIZER), "--model.optimizer.lr", "3e-3"),
        *("--model.warmup_ratio", "0.1", "--trainer.gradient_clip_val", "1.0"),
        *(
            "--data",
            "fine_tune.data.SFTData",
            "--data.path",
            str(path),
            "--data.batch_size",
            "16",
            "--data.epochs",
            EPOCHS[case],
        ),
        *("--data.max_tokens_per_micro_batch", "8192", "--generations.max_new_tokens", "24"),
        *(("--data.prompt", prompt, "--data.completion", str(completion)) if prompt else ()),
    ]
    run = RunFolder(tmp_path / "lightning_logs" / case / "version_0")
    fine_tune("fit", *args)
    fine_tune("test", "--config", str(run.path / "config.yaml"), "--ckpt_path", "best")
    record = run.read()
    validation, test = (result["metrics"] for result in record["results"])
    with open(run.path / "metrics.csv", newline="") as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    print(
        f"\n{case}: {record['num_rows']}, {record['num_steps']} steps in {record['seconds']:.0f} s, "
        f"train/loss {losses[0]:.3f} -> {losses[-1]:.3f}, val/loss {validation['val/loss']:.4f}, "
        f"test/loss {test['test/loss']:.4f}, test/token_accuracy {test['test/token_accuracy']:.4f}"
    )
    assert record["status"] == "finished"
    assert losses[-1] < 0.8 * losses[0]
    assert abs(test["test/loss"] - validation["val/loss"]) < 0.5


def fine_tune(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fine_tune", *args],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def chat_rows(file: Path) -> Path:
    """Conversations made from the Indonesian questions, two questions each where a context has two."""
    rows = [json.loads(line) for line in (DATA / "facqa_id_train.jsonl").read_text().splitlines()]
    chats = []
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        turns = [{"role": "system", "content": "Jawab dengan singkat."}]
        for row in (first, second):
            turns.append({"role": "user", "content": f"{row['context']}\n{row['question']}"})
            turns.append({"role": "assistant", "content": row["answer"]})
        chats.append({"messages": turns})
    return write_rows(file, chats)
