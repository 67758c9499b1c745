"""Commands that warnings and errors name can be pasted, whatever the folders in them are called."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from harness import CommandLine

from fine_tune.modules import SFT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "my runs; it's $HOME"


def printed(text: str, verb: str) -> list[str]:
    """Return the words a shell makes of a printed command, up to what the sentence says behind it."""
    found = re.search(rf"python -m fine_tune ({verb} .*)", text)
    assert found is not None, text
    return shlex.split(found[1])


def test_of_a_run_whose_loss_is_spoiled(
    command_line: CommandLine,
    fit_args: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, factors = SFT.loss_sums, {20: 3.0, 22: float("nan")}

    def spoiled(self: SFT, micro_batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        (loss,) = original(self, micro_batch)
        return (loss * factors.get(self.trainer.global_step + 1, 1.0),)

    monkeypatch.setattr(SFT, "loss_sums", spoiled)
    more = ["--data.epochs", "5", "--model.optimizer.lr", "1e-5"]
    more += ["--trainer.default_root_dir", str(folder)]
    outcome = command_line("fit", *fit_args, *more, root=False)
    run = folder / "lightning_logs" / "run" / "version_0"
    assert printed(outcome.out, "explain-step") == ["explain-step", str(run), "20"]
    assert outcome.code == 2
    assert printed(outcome.err, "explain-step")[:3] == ["explain-step", str(run), "22),"]
    merged = command_line("merge", run)
    assert merged.code == 2
    assert printed(merged.err, "export")[:2] == ["export", str(run)]


def test_of_a_model_that_is_a_run_without_a_checkpoint(
    command_line: CommandLine, fit_args: list[str], folder: Path
) -> None:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    refused = command_line("fit", *fit_args, "--model.model_name_or_path", folder)
    assert refused.code == 2
    fit = ["fit", "--config", str(folder / "config.yaml")]
    assert printed(refused.err, "fit") == fit


def test_of_a_tokenizer_that_was_trained(
    command_line: CommandLine, tmp_path: Path, folder: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("ibu kota negara\n" * 100)
    args = ["--input", json.dumps([str(texts)]), "--output", folder, "--vocab_size", 270]
    outcome = command_line("train-tokenizer", *args)
    assert outcome.code == 0, outcome.err
    words = printed(outcome.out, "fit")
    assert words == ["fit", "--config", "X", "--model.tokenizer", str(folder)]
