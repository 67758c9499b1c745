"""Phi-2's shape at random weights under the shipped experiment: the memory of one row of 1,024 tokens."""

from pathlib import Path

import pytest
import torch
from harness import REPOSITORY, CommandLine, write_rows
from small_models import save_small_model

PUBLISHED_GB = 5.67  # a published run of this model on this task
PHI_2 = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),
]


def test_phi2_xsum_fits_a_small_gpu(command_line: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "phi-2"
    save_small_model(folder, "phi", dtype=torch.float16, **PHI_2)
    files = {}
    for split in ("train", "validation", "test"):
        rows = [{"document": f"{i} " + "satu " * 1500, "summary": "dua " * 30} for i in range(32)]
        files[split] = str(write_rows(tmp_path / f"{split}.jsonl", rows))
    outcome = command_line(
        *("fit", "--config", REPOSITORY / "configs" / "phi2_xsum.yaml"),
        *("--model.model_name_or_path", folder, "--data.path", files, "--data.revision", "null"),
        *(
            "--trainer.max_steps",
            "3",
            "--trainer.log_every_n_steps",
            "1",
            "--generations.rows",
            "0",
        ),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.run("phi2_xsum").read()["num_tokens"]["train"] == 32 * 1024
    peak = max(float(row["perf/vram_peak_gib"] or 0) for row in outcome.metrics("phi2_xsum"))
    gigabytes = peak * 2**30 / 1e9
    print(
        f"\nphi2_xsum, one row of 1,024: peak {gigabytes:.2f} GB allocated; published {PUBLISHED_GB} GB"
    )
    assert gigabytes < PUBLISHED_GB
