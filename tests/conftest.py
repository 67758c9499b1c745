"""Small real models and data for every test: built from a config, saved to a folder, no network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"
# One thread here and in every process a test starts: sums over more threads have other last bits.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from harness import TOKENIZER, CommandLine, Outcome, write_rows
from small_models import save_small_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(TOKENIZER))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with the quickstart's tokenizer, saved as any user's model would be."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    save_small_model(folder, max_position_embeddings=256)
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty rows of uneven length; enough for every split."""
    file = tmp_path / "rows.jsonl"
    write_rows(
        file,
        [
            {"question": f"Berapa {i} + {i % 7}?" + " Jawab." * (i % 5), "answer": str(i + i % 7)}
            for i in range(40)
        ],
    )
    return file


@pytest.fixture
def command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    """Run a verb in this process, as ``python -m fine_tune`` would, with its runs under ``tmp_path``."""
    monkeypatch.delenv("FINE_TUNE_RUN_FOLDER", raising=False)

    def run(*args: object, root: bool = True) -> Outcome:
        from fine_tune.__main__ import main

        texts = [str(arg) for arg in args]
        if root and texts[0] in ("fit", "validate", "test", "sweep"):
            texts += ["--trainer.default_root_dir", str(tmp_path)]
        if texts[0] in ("fit", "validate", "test") and "--report" not in texts:
            texts += ["--report", "null"]  # half a second each
        code = main(texts)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err, tmp_path)

    return run


@pytest.fixture
def fit_args(model_folder: Path, rows_file: Path) -> list[str]:
    """The flags of a small complete run: 8 steps of 8 rows."""
    return [
        *("--model", "fine_tune.modules.SFT", "--model.model_name_or_path", str(model_folder)),
        *("--data", "fine_tune.data.SFTData", "--data.path", str(rows_file)),
        *("--data.prompt", "{question}", "--data.completion", " {answer}"),
        *("--data.epochs", "2", "--data.batch_size", "8", "--model.optimizer.lr", "1e-3"),
        *("--trainer.log_every_n_steps", "1", "--generations.rows", "0", "--report", "null"),
    ]
