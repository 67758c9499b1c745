"""The search finds what a grid measured first: on the quickstart's data, for three seeds of the sampler."""

from pathlib import Path

import pytest
from harness import REPOSITORY
from optuna.trial import FrozenTrial
from test_sweep import start, study_of

from fine_tune.sweeps.driver import best_first
from fine_tune.sweeps.ledger import trials_of

pytestmark = pytest.mark.slow
KEY = "model.optimizer.lr"
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def searched(root: Path, text: str, name: str, *more: str) -> list[FrozenTrial]:
    file = root / f"{name}.yaml"
    file.write_text(text)
    quickstart = ["--config", str(REPOSITORY / "configs" / "quickstart.yaml")]
    short = ["--trainer.max_steps", "49", "--generations.rows", "0", "--targets", "{}"]
    worker = start(root, ["--sweep", str(file), *quickstart, *short, *more])
    out, _ = worker.communicate(timeout=1500)
    assert worker.returncode == 0, out
    return best_first(trials_of(study_of(root, name)), {"val/loss": "minimize"})


@pytest.mark.timeout(3600)
def test_the_best_of_twelve_is_the_grids(tmp_path: Path) -> None:
    grid = searched(tmp_path, f"sampler: grid\nparameters: {{{KEY}: {RATES}}}\n", "grid")
    print("grid:", [(t.params[KEY], round(t.values[0], 4)) for t in grid])
    best_rate, best_loss = grid[0].params[KEY], grid[0].values[0]
    space = f"parameters: {{{KEY}: {{distribution: log_uniform, low: 1e-4, high: 1e-1}}}}\n"
    for seed in ("1", "2", "3"):
        more = ("--trials", "12", "--sampler_seed", seed)
        found = searched(tmp_path, space, f"search_{seed}", *more)[0]
        rate, loss = found.params[KEY], found.values[0]
        print(f"seed {seed}: {rate:.4g}, loss {loss:.4f}")
        assert best_rate / 2 <= rate <= best_rate * 2 or loss <= 1.02 * best_loss
