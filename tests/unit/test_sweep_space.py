"""A sweep file says what is searched; what it cannot mean is refused with its key."""

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fine_tune.errors import UserError
from fine_tune.sweeps.space import read_sweep


def written(folder: Path, text: str) -> str:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return str(file)


def test_every_kind_of_parameter_is_read(tmp_path: Path) -> None:
    sweep = read_sweep(
        written(
            tmp_path,
            """
metrics: {val/loss: minimize, seconds: minimize}
sampler: random
seeds: [1, 2]
parameters:
  model.optimizer.lr: {distribution: log_uniform, low: 1e-5, high: 1e-3}
  model.dropout: {distribution: uniform, low: 0, high: 0.5}
  model.lora.r: {distribution: int, low: 4, high: 18, step: 4}
  data.batch_size: {distribution: int, low: 8, high: 64, log: true}
  model.lr_scheduler: [cosine, constant, null]
""",
        )
    )
    assert sweep.parameters == {
        "model.optimizer.lr": FloatDistribution(1e-5, 1e-3, log=True),
        "model.dropout": FloatDistribution(0.0, 0.5),
        "model.lora.r": IntDistribution(4, 16, step=4),
        "data.batch_size": IntDistribution(8, 64, log=True),
        "model.lr_scheduler": CategoricalDistribution(("cosine", "constant", None)),
    }
    assert sweep.metrics == {"val/loss": "minimize", "seconds": "minimize"}
    assert (sweep.sampler, sweep.pruner, sweep.seeds) == ("random", "none", (1, 2))
    assert sweep.num_settings is None
    assert sweep.corners() == [
        dict(zip(sweep.parameters, values, strict=True))
        for values in [
            (1e-5, 0.0, 4, 8, "cosine"),
            (1e-3, 0.5, 16, 64, "constant"),
            (1e-3, 0.5, 16, 64, None),
        ]
    ]


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    sweep = read_sweep(
        written(
            tmp_path,
            "sampler: grid\nparameters: {a: [1, 2], b: {distribution: int, low: 1, high: 5, step: 2}}",
        )
    )
    assert sweep.num_settings == 6
    pairs = [(1, 1), (1, 3), (1, 5), (2, 1), (2, 3), (2, 5)]
    assert sweep.all_settings() == [{"a": a, "b": b} for a, b in pairs]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "give a mapping"),
        ("parameters: {}", "nothing is searched"),
        ("metrics: {val/loss: minimize}", "nothing is searched"),
        ("parameters: {a: []}", "parameters.a: the list of values is empty"),
        ("parameters: {a: [1, 1]}", "1 and 1 are the same value"),
        ("parameters: {a: [1, true]}", "1 and True are the same value"),
        ("parameters: {a: [8, '8']}", "8 and '8' are the same value"),
        ("parameters: {seed_everything: [1, 2]}", "not searched: give seeds"),
        ("parameters: {a.init_args.b: [1], a.b: [2]}", "named twice"),
        ("parameters: {a: {distribution: [uniform]}}", "give a list of values, or a distribution"),
        ("parameters: {a: [[1]]}", "a value must be a word"),
        ("parameters: {a: 3}", "give a list of values, or a distribution"),
        ("parameters: {a: {distribution: normal, low: 0, high: 1}}", "log_uniform, uniform, int"),
        ("parameters: {a: {distribution: uniform, low: 0}}", "high: a number is needed, got None"),
        ("parameters: {a: {distribution: uniform, low: 2, high: 1}}", "low 2 is above high 1"),
        ("parameters: {a: {distribution: log_uniform, low: 0, high: 1}}", "must be above 0"),
        ("parameters: {a: {distribution: int, low: 0.5, high: 1}}", "a whole number is needed"),
        ("parameters: {a: {distribution: int, low: 1, high: 9, step: 0}}", "step: must be 1"),
        ("parameters: {a: {distribution: uniform, low: 1, high: 9, max: 3}}", "has no 'max'"),
        ("parameters: {a: {distribution: uniform, low: .nan, high: 9}}", "a number is needed"),
        ("sampler: grid\nparameters: {a: {distribution: uniform, low: 0, high: 1}}", "no end"),
        ("sampler: best\nparameters: {a: [1]}", "sampler: 'best' is not known"),
        ("pruner: soon\nparameters: {a: [1]}", "pruner: 'soon' is not known"),
        ("seeds: [1, 1]\nparameters: {a: [1]}", "names one twice"),
        ("seeds: 3\nparameters: {a: [1]}", "give a list of whole numbers"),
        ("metrics: {val/loss: down}\nparameters: {a: [1]}", "'down' is no direction"),
        ("metrics: [val/loss]\nparameters: {a: [1]}", "give names and directions"),
        ("parameter: {a: [1]}", "unknown key 'parameter'; did you mean 'parameters'?"),
        (
            "pruner: median\nmetrics: {a: minimize, b: minimize}\nparameters: {a: [1]}",
            "are not ended early",
        ),
        ("parameters: [", "YAML"),
        ("parameters: {a: [1]}\nparameters: {b: [1]}", "parameters"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_sweep(written(tmp_path, text))
    assert told in "\n".join(error.value.problems)
    assert "sweep.yaml" in error.value.problems[0]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--sweep: 'nowhere.yaml' cannot be read"):
        read_sweep("nowhere.yaml")
