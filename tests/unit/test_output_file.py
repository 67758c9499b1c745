"""Results are never mixed with, or written over, those of another process."""

import json
from pathlib import Path
from typing import Any

import pytest

from fine_tune.errors import UserError
from fine_tune.output_file import OutputFile


def opened(path: Path, model: str, *, overwrite: bool = False) -> OutputFile:
    return OutputFile(path, {"model": model}, overwrite=overwrite)


def line(_: int, result: dict[str, Any]) -> str:
    return json.dumps(result)


def test_of_two_that_start_together_the_second_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = (opened(tmp_path / "out.jsonl", model) for model in "ab")
    first.open()
    first.keep(0, {"x": 1})
    with pytest.raises(UserError, match="another process is writing"):
        second.open()
    first.close()
    again = opened(tmp_path / "out.jsonl", "a")
    assert again.results == {0: {"x": 1}}
    again.close()
    with pytest.raises(UserError, match="model: what lies there was made with a, now it is b"):
        opened(tmp_path / "out.jsonl", "b")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_finished_meanwhile_is_not_written_over(
    tmp_path: Path, overwrite: bool
) -> None:
    output = tmp_path / "out.jsonl"
    first, second = (opened(output, model, overwrite=overwrite) for model in "ab")
    first.open()
    first.keep(0, {"x": 1})
    first.finish(1, line)
    with pytest.raises(UserError, match="was written meanwhile"):
        second.open()
    assert json.loads(output.read_text()) == {"x": 1}
    assert opened(output, "a").is_finished


def test_what_was_there_is_written_over_where_it_was_asked(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="nothing says what it is made from"):
        opened(output, "a")
    asked = opened(output, "a", overwrite=True)
    asked.open()
    asked.keep(0, {"x": 1})
    assert output.read_text() == "mine"
    asked.finish(1, line)
    assert json.loads(output.read_text()) == {"x": 1}


def test_a_kill_before_the_first_result_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.unfinished").touch()
    output = opened(tmp_path / "out.jsonl", "a")
    output.open()
    output.keep(0, {"x": 1})
    output.finish(1, line)
    assert opened(tmp_path / "out.jsonl", "a").is_finished
