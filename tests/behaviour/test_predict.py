"""``predict`` on small real models: what is asked, written and refused, and that it goes on where it stopped."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import REPOSITORY, CommandLine, Outcome, write_rows
from preference_runs import LORA
from small_models import save_small_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fine_tune.modules import Reward
from fine_tune.modules.decoding import Answer, Decoder
from fine_tune.sampling import Sampling

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose likeliest tokens stand clear of the others, which ends some of its answers by one of many stops."""
    folder = tmp_path_factory.mktemp("sharp") / "llama"
    model: Any = save_small_model(folder, initializer_range=0.4, max_position_embeddings=128)
    model.generation_config.eos_token_id = [model.config.eos_token_id, *range(7, 300, 7)]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Forty questions of mixed length, with fields that must come through as they stand."""
    words = ["Berapa", "jumlah", "ibu", "kota", "negara", "provinsi", "tahun", "mata", "uang"]
    choose = random.Random(0)
    rows = [
        {"id": f"{i:03d}", "question": " ".join(choose.choices(words, k=1 + i % 19)), "x": 1.5}
        for i in range(40)
    ]
    file = write_rows(tmp_path / "questions.jsonl", rows)
    file.write_text(file.read_text("utf-8").replace("1.5}", "1.50}"), "utf-8")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def predict(command_line: CommandLine, *args: Any) -> Outcome:
    return command_line("predict", *args, root=False)


def alone(model_folder: Path, questions: Path, output: Path, *more: Any) -> list[Any]:
    """The flags for a model folder without a run."""
    return [
        *("--model.model_name_or_path", model_folder, "--data.prompt", "{question}"),
        *("--data.predict_path", questions, "--output", output),
        *("--sampling.max_new_tokens", NUM_TOKENS, *more),
    ]


def generated(folder: Path, prompts: list[str], **options: Any) -> list[str]:
    """The answers of transformers, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config: Any = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written: Any = model.generate(
                **ids, max_new_tokens=NUM_TOKENS, do_sample=False, **options
            )
        answer = written[0, ids["input_ids"].shape[1] :].tolist()
        end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        answers.append(str(tokenizer.decode(answer[:end], skip_special_tokens=True)).strip())
    return answers


def test_greedy_answers_equal_transformers_and_rows_come_through_as_they_stand(
    command_line: CommandLine, sharp_folder: Path, questions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    outcome = predict(command_line, *alone(sharp_folder, questions, output))
    assert outcome.code == 0, outcome.err
    rows, given = read(output), read(questions)
    assert [{k: row[k] for k in given[0]} for row in rows] == given
    assert all('"x": 1.50, "prediction"' in line for line in output.read_text().splitlines())
    expected = generated(sharp_folder, [row["question"] for row in given])
    assert [row["prediction"] for row in rows] == expected
    reasons = [row["finish_reason"] for row in rows]
    assert reasons.count("stop") > 5 and reasons.count("length") > 5
    assert f"{reasons.count('length')} of 40 answers ended at" in outcome.out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("out.jsonl", "out.jsonl.record.json", "questions.jsonl")
    ], "nothing is written but the output and what it was made from"


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["random", "quickstart"])
def test_500_greedy_answers_equal_transformers_row_by_row(
    command_line: CommandLine,
    sharp_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: bool,
) -> None:
    monkeypatch.chdir(REPOSITORY)  # the quickstart's paths
    draw, folder = random.Random(0), sharp_folder
    asked = [row["question"] for row in read(REPOSITORY / "fine_tune/quickstart/test.jsonl")]
    if trained:
        fitted = command_line("fit", "--config", REPOSITORY / "configs/quickstart.yaml")
        folder = fitted.run("quickstart").checkpoint("best")
    texts = [" ".join(draw.choices(asked, k=1 + i % 5)) for i in range(500)]
    file = write_rows(tmp_path / "in.jsonl", [{"question": text} for text in texts])
    output = tmp_path / "out.jsonl"
    outcome = predict(command_line, *alone(folder, file, output))
    assert outcome.code == 0, outcome.err
    assert [row["prediction"] for row in read(output)] == generated(folder, texts)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("gpt2", {"n_positions": 128}),
        ("mistral", {"sliding_window": 16, "num_key_value_heads": 2}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_models_of_other_kinds_give_the_answers_of_transformers(
    tmp_path: Path, architecture: str, fields: dict[str, Any]
) -> None:
    """Left padding, sliding windows, learned positions; and a state that is no cache of keys and values."""
    model: Any = save_small_model(tmp_path / "model", architecture, initializer_range=0.4, **fields)
    choose = random.Random(0)
    prompts = [[choose.randrange(5, 300) for _ in range(1 + 5 * (i % 7))] for i in range(12)]
    answers = [Answer(i, p, NUM_TOKENS, random.Random(0)) for i, p in enumerate(prompts)]
    decoder = Decoder(model.eval(), [1], 0, Sampling(), max_tokens=180)

    with torch.no_grad():
        ours = {answer.key: answer.written for answer in decoder.write(answers, pytest.fail)}
        for i, prompt in enumerate(prompts):
            whole = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            assert ours[i] == (whole[: whole.index(1)] if 1 in whole else whole), i


def test_a_run_is_asked_as_it_was_trained_and_its_training_data_is_not_needed(
    command_line: CommandLine, fit_args: list[str], rows_file: Path, tmp_path: Path
) -> None:
    run = command_line("fit", *fit_args, *LORA).run()
    rows = read(rows_file)
    rows_file.unlink()
    only_asked = write_rows(tmp_path / "in.jsonl", [{"question": r["question"]} for r in rows])
    config, output = run.path / "config.yaml", tmp_path / "out.jsonl"
    before = sorted(p for p in run.path.rglob("*"))
    args = ["--config", config, "--data.predict_path", only_asked, "--output", output]
    outcome = predict(command_line, *args, "--ckpt_path", "best")
    assert outcome.code == 0, outcome.err
    assert len(read(output)) == 40
    assert sorted(p for p in run.path.rglob("*")) == before, "the run is left as it was"
    finished = predict(command_line, *args)  # a run's config means its best
    assert finished.code == 0 and "is finished: 40 rows" in finished.out
    other = predict(command_line, *args, "--sampling.max_new_tokens", "3")
    assert other.code == 2
    assert "sampling.max_new_tokens: what lies there was made with 128, now it is 3" in other.err
    replaced = predict(command_line, *args, "--sampling.max_new_tokens", "3", "--overwrite", "true")
    assert replaced.code == 0 and len(read(output)) == 40


def test_answers_of_another_form_of_the_model_are_not_mixed_in(
    command_line: CommandLine, sharp_folder: Path, questions: Path, tmp_path: Path
) -> None:
    args = alone(sharp_folder, questions, tmp_path / "out.jsonl", "--sampling.max_new_tokens", "2")
    assert predict(command_line, *args).code == 0
    for setting, value in (("dtype", "bfloat16"), ("config", '{"rms_norm_eps": 0.1}')):
        other = predict(command_line, *args, f"--model.{setting}", value)
        assert other.code == 2, other.out
        assert f"model.{setting}: what lies there was made with nothing, now" in other.err
    same = predict(command_line, *args)
    assert same.code == 0 and "is finished" in same.out


def test_drawn_answers_depend_on_the_seed_and_the_row_alone(
    command_line: CommandLine, sharp_folder: Path, questions: Path, tmp_path: Path
) -> None:
    drawn = ["--sampling.temperature", "1.5", "--sampling.top_p", "0.95", "--sampling.answers", "2"]

    def answers(name: str, *more: Any) -> list[Any]:
        output = tmp_path / f"{name}.jsonl"
        args = alone(sharp_folder, questions, output, *drawn, *more)
        outcome = predict(command_line, *args)
        assert outcome.code == 0, outcome.err
        return [row["prediction"] for row in read(output)]

    first = answers("first")
    assert all(len(both) == 2 for both in first)
    assert sum(one != two for one, two in first) > 30
    assert answers("small", "--data.max_tokens_per_micro_batch", "20") == first
    assert answers("seed", "--sampling.seed", "7") != first


def test_out_of_memory_halves_what_is_taken_at_once_and_changes_no_answer(
    command_line: CommandLine,
    sharp_folder: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, halved = tmp_path / "whole.jsonl", tmp_path / "halved.jsonl"
    drawn = ["--sampling.temperature", "0.8"]
    assert predict(command_line, *alone(sharp_folder, questions, whole, *drawn)).code == 0
    sizes: list[int] = []
    choose = Decoder._choose

    def small_device(self: Decoder, answers: list[Answer], logits: Any) -> list[int]:
        sizes.append(len(answers) * max(answer.most_columns for answer in answers))
        if sizes[-1] > 250:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return choose(self, answers, logits)

    monkeypatch.setattr(Decoder, "_choose", small_device)
    monkeypatch.setattr("fine_tune.data.predict_loader.ITEMS_PER_BATCH", 10)
    outcome = predict(command_line, *alone(sharp_folder, questions, halved, *drawn))
    assert outcome.code == 0, outcome.err
    assert read(halved) == read(whole)
    assert sum(size > 250 for size in sizes) == 1, "the other batches take what fits"


def test_rows_that_have_their_answer_are_not_asked_again(
    command_line: CommandLine,
    sharp_folder: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    drawn = ["--sampling.temperature", "0.8"]
    assert predict(command_line, *alone(sharp_folder, questions, straight, *drawn)).code == 0
    take_ended, asked = Decoder.take_ended, []

    def fails(self: Decoder) -> list[Answer]:
        if len(asked) > 15:
            raise RuntimeError("a defect")
        asked.extend(ended := take_ended(self))
        return ended

    monkeypatch.setattr(Decoder, "take_ended", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        predict(command_line, *alone(sharp_folder, questions, resumed, *drawn))
    assert not resumed.exists()
    unfinished = tmp_path / "resumed.jsonl.unfinished"
    kept = len(read(unfinished))
    assert kept > 15
    with open(unfinished, "a") as handle:
        handle.write('{"row": 39, "predic')  # as a kill leaves it
    monkeypatch.setattr(Decoder, "take_ended", take_ended)
    asked.clear()
    outcome = predict(command_line, *alone(sharp_folder, questions, resumed, *drawn))
    assert outcome.code == 0, outcome.err
    assert f"{kept} of 40 rows are done already" in outcome.out
    assert read(resumed) == read(straight)
    assert not unfinished.exists()


def test_a_conversation_is_answered_behind_its_last_question(
    command_line: CommandLine, sharp_folder: Path, tmp_path: Path
) -> None:
    ask = [{"role": "user", "content": "Apa ibu kota Indonesia?"}]
    answered = [*ask, {"role": "assistant", "content": "Jakarta"}]
    rows = write_rows(tmp_path / "in.jsonl", [{"messages": ask}, {"messages": answered}])
    output = tmp_path / "out.jsonl"
    args = alone(sharp_folder, rows, output)
    args = [arg for arg in args if arg not in ("--data.prompt", "{question}")]
    outcome = predict(command_line, *args)
    assert outcome.code == 0, outcome.err
    tokenizer = AutoTokenizer.from_pretrained(sharp_folder)
    prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    (expected,) = generated(sharp_folder, [prompt])
    assert [row["prediction"] for row in read(output)] == [expected, expected]
    # a model that was trained on conversations takes a prompt for what its user says
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Apa ibu kota Indonesia?"}])
    args = [*args, "--data.path", rows, "--data.predict_path", plain, "--overwrite", "true"]
    assert predict(command_line, *args).code == 0
    assert [row["prediction"] for row in read(output)] == [expected]


def test_a_long_prompt_loses_its_beginning_and_the_row_says_so(
    command_line: CommandLine, sharp_folder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"question": "ibu kota " * 100}, {"question": "ibu"}])
    output = tmp_path / "out.jsonl"
    outcome = predict(command_line, *alone(sharp_folder, rows, output))
    assert outcome.code == 0, outcome.err
    assert "1 prompts are longer than the model's 128 positions" in outcome.out
    long, short = read(output)
    assert long["prompt_cut"] > 0 and "prompt_cut" not in short
    drop = alone(sharp_folder, rows, tmp_path / "no.jsonl", "--data.truncation", "drop")
    refused = predict(command_line, *drop)
    assert refused.code == 2 and "in.jsonl:1:" in refused.err


def test_a_reward_run_scores_the_answers_it_is_given_as_in_transformers(
    command_line: CommandLine, reward_args: list[str], tmp_path: Path
) -> None:
    run = command_line("fit", *reward_args).run()
    pairs = read(tmp_path / "pairs.jsonl")
    rows = [
        *({"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs[:3]),
        {"prompt": pairs[0]["prompt"], "prediction": [pairs[0]["chosen"], pairs[0]["rejected"]]},
        *pairs[:3],
    ]
    file, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "scores.jsonl"
    config = run.path / "config.yaml"
    args = ["--config", config, "--data.predict_path", file, "--output", output]
    outcome = predict(command_line, *args)
    assert outcome.code == 0, outcome.err
    scored = read(output)
    best = run.checkpoint("best")
    model = AutoModelForSequenceClassification.from_pretrained(best).eval()
    tokenizer = AutoTokenizer.from_pretrained(best)

    def reward(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")
        with torch.no_grad():
            return float(model(**ids).logits[0, 0])

    for row, pair in zip(scored[:3], pairs, strict=False):
        assert row["reward"] == pytest.approx(reward(pair["prompt"], pair["chosen"]), abs=1e-5)
    first = [scored[4]["reward_chosen"], scored[4]["reward_rejected"]]
    assert scored[3]["reward"] == pytest.approx(first)
    assert first[1] == pytest.approx(reward(pairs[0]["prompt"], pairs[0]["rejected"]), abs=1e-5)
    # the same from the checkpoint's folder alone
    alone = ["--model.model_name_or_path", best, "--data.predict_path", file, "--output"]
    again = predict(command_line, *alone, tmp_path / "again.jsonl")
    assert again.code == 0, again.err
    assert [row.get("reward") for row in read(tmp_path / "again.jsonl")][:3] == pytest.approx(
        [row["reward"] for row in scored[:3]]
    )


def test_out_of_memory_while_scoring_changes_no_score_and_writes_nothing_else(
    command_line: CommandLine,
    reward_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = command_line("fit", *reward_args).run()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    args = ["--config", run.path / "config.yaml", "--data.predict_path", tmp_path / "pairs.jsonl"]
    assert predict(command_line, *args, "--output", tmp_path / "whole.jsonl").code == 0
    rewards, sizes = Reward._rewards, []

    def small_device(self: Reward, input_ids_BT: Any, lasts_B: Any) -> Any:
        sizes.append(len(lasts_B))
        if len(lasts_B) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rewards(self, input_ids_BT, lasts_B)

    monkeypatch.setattr(Reward, "_rewards", small_device)
    outcome = predict(
        command_line, *args, "--output", here / "out.jsonl", "--trainer.default_root_dir", here
    )
    assert outcome.code == 0, outcome.err
    assert max(sizes) > 3 and "out of memory" in outcome.out
    halved, whole = read(here / "out.jsonl"), read(tmp_path / "whole.jsonl")
    for name in ("reward_chosen", "reward_rejected"):
        assert [r[name] for r in halved] == pytest.approx([r[name] for r in whole], abs=1e-6)
    assert {p.name for p in here.iterdir()} == {"out.jsonl", "out.jsonl.record.json"}


def test_mistakes_are_told_at_once_before_weights_load(
    command_line: CommandLine,
    sharp_folder: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*args: Any) -> str:
        outcome = predict(command_line, *args)
        assert outcome.code == 2, outcome.out
        assert "Traceback" not in outcome.err
        return outcome.err

    monkeypatch.setattr("fine_tune.modules.huggingface.load_weights", pytest.fail)
    told = refused(
        *alone(sharp_folder, questions, tmp_path / "no" / "out.jsonl"),
        *("--data.prompt", "{qestion}", "--ckpt_path", tmp_path / "nothing"),
    )
    assert "output: the folder" in told
    assert "wants the field 'qestion'" in told and "did you mean 'question'?" in told
    assert "ckpt_path" in told and "does not exist" in told
    good = tmp_path / "out.jsonl"
    assert "data.predict_path: none given" in refused("--model.model_name_or_path", sharp_folder)
    (tmp_path / "run.yaml").write_text(
        f"model: {{class_path: SFT, init_args: {{model_name_or_path: {sharp_folder}}}}}\n"
        f"data: {{class_path: SFTData, init_args: {{path: {questions}, predict_path: null}}}}\n"
    )
    of_run = ["--config", tmp_path / "run.yaml", "--output", good]
    assert "data.predict_path: none given" in refused(*of_run)
    assert "does not exist" in refused(*alone(sharp_folder, tmp_path / "no.jsonl", good))
    (tmp_path / "empty.jsonl").touch()
    assert "the file is empty" in refused(*alone(sharp_folder, tmp_path / "empty.jsonl", good))
    assert "is the file that is read" in refused(*alone(sharp_folder, questions, questions))
    assert "a folder; give a file" in refused(*alone(sharp_folder, questions, _folder(tmp_path)))
    short = ["--sampling.max_new_tokens", "128"]
    assert "no room for a prompt" in refused(*alone(sharp_folder, questions, good, *short))
    wrong = ["--sampling.temperature", "-1", "--sampling.top_p", "2"]
    told = refused(*alone(sharp_folder, questions, good, *wrong))
    assert "sampling.temperature" in told and "sampling.top_p" in told
    misspelt = alone(sharp_folder, questions, good, "--sampling.temprature", "1")
    assert "did you mean '--sampling.temperature'?" in refused(*misspelt)
    write_rows(good, [{"mine": 1}])
    assert "nothing says what it is made from" in refused(*alone(sharp_folder, questions, good))
    assert read(good) == [{"mine": 1}]
    bad = write_rows(tmp_path / "bad.jsonl", [{"question": "a"}, {"question": None}, {}])
    told = refused(*alone(sharp_folder, bad, tmp_path / "x.jsonl"))
    assert "bad.jsonl:2: the field 'question' is null" in told and "bad.jsonl:3:" in told


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    return folder


def test_help_names_the_sampling_settings(
    command_line: CommandLine, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line("predict", "--help")
    told = capfd.readouterr().out
    assert "--sampling.temperature" in told and "--output" in told and "nucleus" in told
