"""The quickstart, then DPO from its best checkpoint: answers that were right stay right, and the odds come apart."""

import json
from typing import Any

import pytest
from harness import REPOSITORY, CommandLine, Outcome

MOST_LOST = 2


def answers(outcome: Outcome, name: str, stage: str) -> dict[str, dict[str, Any]]:
    lines = (outcome.run(name).path / "generations.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {answer["prompt"]: answer for answer in found if answer["stage"].startswith(stage)}


@pytest.mark.slow
def test_dpo_after_sft_keeps_what_was_right_and_prefers_it_more(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)  # the rows' paths
    sft = command_line("fit", "--config", REPOSITORY / "configs" / "quickstart.yaml")
    assert sft.code == 0, sft.err
    model = ["--model.model_name_or_path", str(sft.run("quickstart").path)]
    dpo = command_line("fit", "--config", REPOSITORY / "configs" / "quickstart_dpo.yaml", *model)
    assert dpo.code == 0, dpo.err
    before, after = (
        answers(dpo, "quickstart", "test"),
        answers(dpo, "quickstart_dpo", "test"),
    )
    right = [prompt for prompt, answer in before.items() if answer["exact_match"]]
    lost = [prompt for prompt in right if not after[prompt]["exact_match"]]
    print(f"\nof {len(right)} answers right after SFT, DPO lost {len(lost)}: {lost}")
    assert len(right) >= 200 and len(lost) <= MOST_LOST
    first, last = (answers(dpo, "quickstart_dpo", stage) for stage in ("before", "after"))
    assert all(answer["log_odds"] > first[prompt]["log_odds"] for prompt, answer in last.items())
    parent = dpo.run("quickstart_dpo").read()["parents"][0]
    assert str(sft.run("quickstart").path) in json.dumps(parent)
    assert "asked" in dpo.out and "log-odds" in dpo.out
