"""The test split: sealed while a model is trained, opened by one door, every opening counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import TOKENIZER, CommandLine, write_rows
from lightning.pytorch import Callback, LightningModule, Trainer

from fine_tune.data import SFTData
from fine_tune.errors import UserError
from fine_tune.runs.run_folder import run_of


class AsksForTestRows(Callback):
    """Asks for test rows in every hook of a fit, in one of the ways a user might try."""

    def __init__(self, how: str = "rows", hook: str = "on_train_batch_end") -> None:
        self.how = how
        setattr(self, hook, self._ask)

    def _ask(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.how == "rows":
            data.rows("test")
        elif self.how == "loader":
            data.test_dataloader()
        elif self.how == "seal":
            data.prepared.test.open()
        elif self.how == "setup":
            data.setup("test")
        else:
            trainer.test(pl_module, datamodule=data)


def damage(checkpoint: Path | None) -> None:
    assert checkpoint is not None
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def noted_openings(root: Path) -> list[Path]:
    return list(root.glob("lightning_logs/.cache/test_splits/*/openings.jsonl"))


class DamagesTheBest(Callback):
    """Cuts the best checkpoint short once it is validated: it is whole until fit tests it."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            damage(run_of(trainer).checkpoint("best"))


@pytest.mark.parametrize("by_path", [True, False])
def test_a_test_of_a_damaged_checkpoint_opens_nothing(
    command_line: CommandLine, fit_args: list[str], by_path: bool
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    best = run.checkpoint("best")
    damage(best)
    which = ["--ckpt_path", best if by_path else "best"]
    outcome = command_line("test", "--config", run.path / "config.yaml", *which, root=False)
    assert outcome.code == 2 and "is damaged" in outcome.err
    assert "test_openings" not in run.read() and noted_openings(outcome.root) == []


def test_a_fit_whose_best_checkpoint_is_damaged_tests_nothing(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    end = ["--trainer.callbacks+=test_sealed.DamagesTheBest", "--test_at_end", "true"]
    outcome = command_line("fit", *fit_args, "--trainer.max_steps", "1", *end)
    assert outcome.code == 2 and "is damaged" in outcome.err
    assert "test_openings" not in outcome.run().read() and noted_openings(outcome.root) == []
    again = ["--config", outcome.run().path / "config.yaml", "--ckpt_path", "last"]
    finished = command_line("fit", *again, root=False)
    assert finished.code == 2 and "is damaged" in finished.err
    assert noted_openings(outcome.root) == []


@pytest.mark.parametrize("test_at_end", ["false", "true"])
@pytest.mark.parametrize(
    ("how", "hook"),
    [
        *((how, "on_train_batch_end") for how in ("rows", "loader", "setup", "seal", "test")),
        *(("rows", hook) for hook in ("on_train_start", "on_validation_end", "on_train_end")),
    ],
)
def test_nobody_gets_test_rows_before_the_last_step(
    command_line: CommandLine, fit_args: list[str], how: str, hook: str, test_at_end: str
) -> None:
    ask = ["--trainer.callbacks+=test_sealed.AsksForTestRows", "--trainer.callbacks.how", how]
    ask += ["--trainer.callbacks.hook", hook, "--trainer.max_steps", "2"]
    outcome = command_line("fit", *fit_args, *ask, "--test_at_end", test_at_end)
    assert outcome.code == 2, outcome.out
    assert "the test split is sealed while a model is trained" in outcome.err
    assert "test_openings" not in outcome.run().read()


def test_openings_are_counted_over_all_runs(command_line: CommandLine, fit_args: list[str]) -> None:
    short = [*fit_args, "--trainer.max_steps", "2"]
    first = command_line("fit", *short, "--name", "one", "--test_at_end", "true")
    assert "opened for the 1st time" in first.out
    # another run, another template, another seed: the same rows
    second = command_line(
        *("fit", *short, "--name", "two", "--test_at_end", "true", "--seed_everything", "7"),
        *("--data.prompt", "Soal: {question}"),
    )
    assert "opened for the 2nd time" in second.out
    config = first.run("one").path / "config.yaml"
    third = command_line("test", "--config", config, "--ckpt_path", "best", root=False)
    assert third.code == 0, third.err
    assert "opened for the 3rd time" in third.out
    assert f"{first.run('one').path}  test/" in third.out
    assert f"{second.run('two').path}  test/" in third.out
    openings = first.run("one").read()["test_openings"]
    assert len(openings) == 2
    assert all("test/loss" in opening["result"] and opening["time"] for opening in openings)


def test_other_rows_are_another_test_split(command_line: CommandLine, fit_args: list[str]) -> None:
    short = [*fit_args, "--trainer.max_steps", "2", "--test_at_end", "true"]
    command_line("fit", *short)
    outcome = command_line("fit", *short, "--data.max_rows", "{test: 2}")
    assert "opened for the 1st time" in outcome.out


def test_a_run_that_stopped_early_does_not_open_it(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    stop = ["--trainer.max_time", "00:00:00:00", "--test_at_end", "true"]
    outcome = command_line("fit", *fit_args, *stop)
    assert outcome.code == 0, outcome.err
    assert "the test split stays sealed" in outcome.out
    assert "test_openings" not in outcome.run().read()


def data(rows_file: Path, tmp_path: Path, **options: Any) -> SFTData:
    return SFTData(
        path=str(rows_file),
        prompt="{question}",
        completion=" {answer}",
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def test_the_identity_is_the_rows_not_how_they_are_read(rows_file: Path, tmp_path: Path) -> None:
    split = {"validation": 4, "test": 40 - 4 - 8}
    first = data(rows_file, tmp_path, split=split).make_plan().test_hash
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    write_rows(rows_file, rows[::-1])
    assert data(rows_file, tmp_path, split=split, max_length=20).make_plan().test_hash == first
    assert (
        data(rows_file, tmp_path, split={"validation": 4, "test": 4}).make_plan().test_hash != first
    )


def test_test_rows_lie_apart_from_the_others(rows_file: Path, tmp_path: Path) -> None:
    module = data(rows_file, tmp_path)
    plan = module.make_plan()
    assert plan.num_rows["test"] > 0
    with pytest.raises(UserError, match="sealed"):
        module.rows("test")
    assert sorted({p.name for p in (tmp_path / "cache" / "tokens").glob("*/*") if p.is_dir()}) == [
        "train",
        "validation",
    ]
    assert (tmp_path / "cache" / "test_splits" / str(plan.test_hash)).is_dir()


def test_changed_test_rows_are_refused(rows_file: Path, tmp_path: Path) -> None:
    module = data(rows_file, tmp_path)
    module.prepare_data()
    sealed = module.sealed_test
    assert sealed is not None
    file = next((sealed.folder / sealed.key).glob("*.arrow"))
    content = bytearray(file.read_bytes())
    ids = module.tokenizer("Berapa")["input_ids"][0].to_bytes(4, "little")
    content[content.index(ids)] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="the sealed test split was changed"):
        module.setup("test")


def test_openings_are_remembered_without_the_run_or_the_cache(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path
) -> None:
    args = [*fit_args, "--trainer.max_steps", "1", "--test_at_end", "true"]
    command_line("fit", *args, "--name", "one")
    shutil.rmtree(tmp_path / "lightning_logs" / "one")
    second = command_line("fit", *args, "--name", "two")
    assert "opened for the 2nd time" in second.out
    shutil.rmtree(tmp_path / "lightning_logs" / ".cache")
    (tmp_path / "lightning_logs" / "zzz" / "version_0").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "zzz" / "version_0" / "run.json").write_text("{")
    third = command_line("fit", *args, "--name", "three")
    assert third.code == 0, third.err
    assert "opened for the 2nd time" in third.out  # the run that is left tells of its own
    assert "its openings are not counted" in third.out


def test_rows_opened_in_another_split_are_told(
    command_line: CommandLine, fit_args: list[str], rows_file: Path
) -> None:
    args = [*fit_args, "--trainer.max_steps", "1", "--test_at_end", "true"]
    first = command_line("fit", *args)
    num_test = first.run().read()["num_rows"]["test"]
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    more = [{"question": f"Soal baru {i}?", "answer": str(i)} for i in range(40)]
    write_rows(rows_file, [{**row, "id": i} for i, row in enumerate([*rows, *more])])
    second = command_line("fit", *args)
    assert "opened for the 1st time" in second.out
    assert f"{num_test} of its rows were opened before, in other test splits" in second.out


def test_test_runs_from_inside_the_run_folder(
    command_line: CommandLine, fit_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    monkeypatch.chdir(run.path)
    outcome = command_line("test", "--config", "config.yaml", "--ckpt_path", "best", root=False)
    assert outcome.code == 0, outcome.err
    assert "opened for the 1st time" in outcome.out


def test_a_finished_run_can_still_be_tested_at_its_end(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    again = ["fit", "--config", run.path / "config.yaml", "--ckpt_path", "last"]
    outcome = command_line(*again, "--test_at_end", "true", root=False)
    assert outcome.code == 0, outcome.err
    assert "opened for the 1st time" in outcome.out
    assert "test/loss" in outcome.out


def test_whoever_opens_it_is_counted(rows_file: Path, tmp_path: Path) -> None:
    module = data(rows_file, tmp_path)
    module.setup("test")
    assert len(module.rows("test")) == module.plan.num_rows["test"]
    sealed: Any = module.sealed_test
    sealed.open()
    assert len(sealed.openings()) == 2
    assert all(o["test_hash"] == sealed.hash and o["time"] for o in sealed.openings())


def test_an_opening_outside_a_run_is_told_by_the_next_one(
    command_line: CommandLine, fit_args: list[str]
) -> None:
    ask = ["--trainer.callbacks+=test_sealed.AsksForTestRows", "--trainer.callbacks.how", "setup"]
    ask += ["--trainer.callbacks.hook", "on_validation_end"]
    run = command_line("fit", *fit_args, "--trainer.max_steps", "1").run()
    verb = ["--config", run.path / "config.yaml", "--ckpt_path", "best"]
    looked = command_line("validate", *verb, *ask, root=False)
    assert looked.code == 0, looked.err
    tested = command_line("test", *verb, root=False)
    assert "opened for the 2nd time" in tested.out and "outside a run" in tested.out
    (listed,) = json.loads(command_line("runs", "--json", "--root", run.path.parents[2]).out)
    assert listed["test_openings"] == 2


def test_rows_handed_out_before_are_not_at_hand_while_a_model_is_trained(
    rows_file: Path, tmp_path: Path
) -> None:
    module = data(rows_file, tmp_path)
    module.setup("test")
    module.setup("fit")
    with pytest.raises(UserError, match="sealed while a model is trained"):
        module.rows("test")
