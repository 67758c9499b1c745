"""The page of a sweep: every trial, what failed and why, what mattered, in both languages; nothing in it is alive."""

from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from fine_tune.report.words import Language
from fine_tune.sweeps.compare import Difference
from fine_tune.sweeps.ledger import trials_of
from fine_tune.sweeps.page import write_sweep_page
from fine_tune.sweeps.space import Sweep
from fine_tune.sweeps.wandb_file import write_wandb

HOSTILE = "<script>alert(1)</script> $\\nosuch$"
PARAMETERS = {
    "model.optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
    "model.lora.r": optuna.distributions.IntDistribution(4, 16, step=4),
    "purpose": optuna.distributions.CategoricalDistribution(("plain", HOSTILE)),
}


def study_with(num_metrics: int) -> optuna.Study:
    study = optuna.create_study(directions=["minimize"] * num_metrics)
    for i in range(6):
        params = {
            "model.optimizer.lr": 10 ** -(1.5 + i / 2),
            "model.lora.r": 4 + 4 * (i % 4),
            "purpose": ("plain", HOSTILE)[i % 2],
        }
        trial = create_trial(
            values=[1.0 + (i - 2) ** 2, 10.0 - i][:num_metrics],
            params=params,
            distributions=PARAMETERS,
            user_attrs={"seconds": 61.0, "runs": [f"/r/{i}"]},
        )
        study.add_trial(trial)
    study.add_trial(
        create_trial(
            state=TrialState.FAIL,
            params=params,
            distributions=PARAMETERS,
            user_attrs={"reason": f"non-finite {HOSTILE}"},
        )
    )
    return study


@pytest.mark.parametrize("language", ["en", "id"])
@pytest.mark.parametrize("num_metrics", [1, 2])
def test_the_page_tells_all_and_runs_nothing(
    num_metrics: int, language: Language, tmp_path: Path
) -> None:
    metrics = dict(list({"val/loss": "minimize", "seconds": "minimize"}.items())[:num_metrics])
    sweep = Sweep(PARAMETERS, metrics, pruner="none")
    against = {2: Difference(-0.5, -0.75, -0.25), 1: Difference(0.1, -0.1, 0.3)}
    study = study_with(num_metrics)
    trials = trials_of(study)
    page = write_sweep_page(study, trials, sweep, tmp_path, ["fit it"], against, language)
    html, text = page.read_text(), page.with_suffix(".md").read_text()
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == 2 + num_metrics  # history, slices, parallel ...
    failed = {"en": "failed", "id": "gagal"}[language]
    verdicts = {"en": ("better", "cannot tell"), "id": ("lebih baik", "tidak dapat dibedakan")}
    for told in (*verdicts[language], failed, "non-finite", "fit it", "/r/2", "log uniform"):
        assert told in text
    rows = [line for line in text.splitlines() if line.startswith("| 2 |")]
    assert "←" in rows[0]  # the best one is marked
    assert text.index("| 2 |") < text.index("| 1 |") < text.index("| 6 |")


def test_the_same_search_for_weights_and_biases(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    write_wandb(Sweep(PARAMETERS, {"val/loss": "minimize"}), "s", ["--config", "a.yaml"], file)
    assert yaml.safe_load(file.read_text()) == {
        "name": "s",
        "method": "bayes",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {
            "model.optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1},
            "model.lora.r": {"values": [4, 8, 12, 16]},
            "purpose": {"values": ["plain", HOSTILE]},
        },
        "command": [
            *("${env}", "${interpreter}", "-m", "fine_tune", "fit", "--config", "a.yaml"),
            "${args}",
        ],
    }
