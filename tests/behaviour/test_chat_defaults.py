"""``chat`` without flags: how it answers, and which runs it cannot talk to."""

from pathlib import Path
from typing import Any

import pytest
from harness import CommandLine

from fine_tune.commands.chat_model import ChatModel
from fine_tune.sampling import Sampling


@pytest.mark.parametrize(("flags", "temperature"), [([], 0.6), (["--temperature", "0"], 0.0)])
def test_answers_are_drawn_at_temperature_0_6_unless_another_is_given(
    command_line: CommandLine,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    temperature: float,
) -> None:
    used: list[Sampling] = []
    stream = ChatModel.stream

    def seen(self: ChatModel, ids: list[int], sampling: Sampling, *args: Any, **more: Any) -> Any:
        used.append(sampling)
        return stream(self, ids, sampling, *args, **more)

    monkeypatch.setattr(ChatModel, "stream", seen)
    outcome = command_line("chat", model_folder, "--once", "Berapa?", "--max_new_tokens", 2, *flags)
    assert outcome.code == 0, outcome.err
    assert [sampling.temperature for sampling in used] == [temperature]


def test_a_reward_model_is_nobody_to_talk_to(
    command_line: CommandLine, reward_args: list[str]
) -> None:
    run = command_line("fit", *reward_args, "--trainer.max_steps", 1).run()
    for more in ([], ["--compare"]):
        refused = command_line("chat", run.path, "--once", "Berapa?", *more)
        assert (refused.code, refused.out) == (2, "")
        assert "a reward model scores answers and writes none" in refused.err
        assert "predict" in refused.err
