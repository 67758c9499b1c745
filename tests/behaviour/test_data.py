"""Preparation: cached by all that decides tokens, counted, and the same for every format."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import TOKENIZER, write_rows
from transformers import AutoTokenizer

from fine_tune.data import SFTData
from fine_tune.data.sources import Source
from fine_tune.errors import UserError


def data(path: Path | str, tmp_path: Path, **options: Any) -> SFTData:
    settings: dict[str, Any] = {"prompt": "{question}", "completion": " {answer}", "split": "none"}
    return SFTData(
        path=str(path),
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
        **{**settings, **options},
    )


def cached(module: SFTData) -> bool:
    return "tokens from the cache" in module.make_plan().notes


def test_a_second_start_uses_the_cache(rows_file: Path, tmp_path: Path) -> None:
    first, second = data(rows_file, tmp_path), data(rows_file, tmp_path)
    assert not cached(first)
    assert cached(second)
    assert first.rows("train").to_list() == second.rows("train").to_list()


def test_the_cache_key_is_data_template_tokenizer_and_options(
    rows_file: Path, tmp_path: Path
) -> None:
    data(rows_file, tmp_path).prepare_data()
    other_tokenizer = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(["Berapa"])
    tokenizer.save_pretrained(other_tokenizer)
    assert not cached(data(rows_file, tmp_path, completion="{answer}"))
    assert not cached(data(rows_file, tmp_path, max_length=20))
    assert not cached(data(rows_file, tmp_path, split=None))
    module = data(rows_file, tmp_path)
    module.tokenizer_source = str(other_tokenizer)
    assert not cached(module)
    rows_file.write_text(rows_file.read_text().replace('"0"', '"1"', 1))
    assert not cached(data(rows_file, tmp_path))


def test_truncation_is_counted_and_long_answers_are_left_out(tmp_path: Path) -> None:
    rows = [{"question": "a " * 30, "answer": "b"}, {"question": "a", "answer": "b " * 30}]
    rows += [{"question": "a", "answer": "b"}] * 3
    plan = data(write_rows(tmp_path / "r.jsonl", rows), tmp_path, max_length=16).make_plan()
    assert plan.num_rows == {"train": 4}
    assert plan.longest_row == {"train": 16}
    assert plan.notes == [
        "train: 1 rows truncated to 16 tokens (prompt_left)",
        "train: 1 rows left out, longer than 16 tokens (prompt_left)",
    ]


def test_lost_supervised_tokens_are_counted(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b " * 30}]
    file = write_rows(tmp_path / "r.jsonl", rows)
    plan = data(file, tmp_path, max_length=8, truncation="completion_right").make_plan()
    assert any("supervised tokens lost to truncation" in note for note in plan.notes)


def test_max_rows_and_counts(rows_file: Path, tmp_path: Path) -> None:
    split = {"validation": 6, "test": 4}
    plan = data(rows_file, tmp_path, split=split, max_rows={"train": 10, "test": 2}).make_plan()
    assert plan.num_rows == {"train": 10, "validation": 6, "test": 2}


def test_splits_share_no_prompt_and_lose_no_row(rows_file: Path, tmp_path: Path) -> None:
    module = data(rows_file, tmp_path, split=None)
    module.setup("test")
    ids = [
        row for split in ("train", "validation", "test") for row in module.rows(split)["row_id"][:]
    ]
    assert sorted(ids) == list(range(40))


def test_the_plan_counts_steps(rows_file: Path, tmp_path: Path) -> None:
    module = data(rows_file, tmp_path, batch_size=16, epochs=3)
    assert (module.make_plan().steps_per_epoch, module.make_plan().num_steps) == (3, 9)
    assert module.make_plan(max_steps=4).num_steps == 4
    assert module.make_plan(max_steps=4).planned_steps == 9
    module.epochs = None
    assert module.make_plan(max_steps=7).planned_steps == 9


def test_there_is_nothing_to_test_without_a_test_split(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to test"):
        data(rows_file, tmp_path).rows("test")


def test_rows_with_a_split_of_their_own_are_not_split_again(
    rows_file: Path, tmp_path: Path
) -> None:
    module = SFTData(
        path={"train": str(rows_file), "validation": str(rows_file)},
        prompt="{question}",
        completion="{answer}",
        split={"train": 0.5, "test": 0.5},
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(UserError, match="has splits of its own"):
        module.prepare_data()


def test_changed_data_with_the_same_time_stamp_is_read_anew(
    rows_file: Path, tmp_path: Path
) -> None:
    import os

    data(rows_file, tmp_path).prepare_data()
    stat = rows_file.stat()
    rows_file.write_text(rows_file.read_text().replace("Berapa", "Hitung"))
    os.utime(rows_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    module = data(rows_file, tmp_path)
    assert module.tokenizer.decode(module.rows("train")[0]["input_ids"]).startswith("Hitung")


def test_sources_are_split_together(tmp_path: Path) -> None:
    rows = [{"question": f"soal {i}", "answer": str(i)} for i in range(60)]
    files = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::-1])]
    module = SFTData(
        sources=[Source(str(file), prompt="{question}", completion="{answer}") for file in files],
        split={"validation": 20, "test": 10},
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
    )
    assert module.make_plan().num_rows == {"train": 90, "validation": 20, "test": 10}
    module.setup("test")
    prompts = {
        split: {str(row["input_ids"]) for row in module.rows(split)}
        for split in ("train", "validation", "test")
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_prompts_shared_by_the_datas_own_splits_are_told(rows_file: Path, tmp_path: Path) -> None:
    paths = {"train": str(rows_file), "validation": str(rows_file)}
    module = SFTData(
        path=paths,
        prompt="{question}",
        completion="{answer}",
        tokenizer=str(TOKENIZER),
        cache_dir=str(tmp_path / "cache"),
    )
    assert (
        "WARNING: 40 prompts stand both in train and in validation" in module.make_plan().notes[0]
    )


def test_another_wording_of_the_template_moves_nobody(rows_file: Path, tmp_path: Path) -> None:
    first = data(rows_file, tmp_path, split=None)
    second = data(rows_file, tmp_path, split=None, prompt="Soal: {question}\nJawab:")
    assert first.rows("train")["row_id"][:] == second.rows("train")["row_id"][:]


def test_rows_without_a_prompt_are_split_by_what_they_say(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [{"answer": f"jawaban {i}"} for i in range(200)])
    plan = data(file, tmp_path, split=None, prompt="", completion="{answer}").make_plan()
    assert plan.num_rows["train"] < 180 and plan.num_rows["test"] > 5


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = [{"question": f"soal {i}", "answer": "b", "talk": i // 5} for i in range(200)]
    module = data(write_rows(tmp_path / "r.jsonl", rows), tmp_path, split=None, group_by="talk")
    module.setup("test")
    talks = [{i // 5 for i in module.rows(split)["row_id"][:]} for split in module.plan.num_rows]
    assert sum(map(len, talks)) == 40 == len(set.union(*talks))


def test_strata_have_the_same_share_in_every_split(tmp_path: Path) -> None:
    topics = ["hukum"] * 100 + ["sains"] * 60 + ["seni"] * 40
    rows = [{"question": f"s {i}", "answer": "b", "topic": t} for i, t in enumerate(topics)]
    file = write_rows(tmp_path / "r.jsonl", rows)
    module = data(file, tmp_path, split={"validation": 20, "test": 20}, stratify_by="topic")
    plan = module.make_plan()
    assert plan.num_rows == {"train": 160, "validation": 20, "test": 20}
    splits = module.prepared.facts["audit"]["splits"]
    for of_split in splits.values():
        assert of_split["strata"] == {"hukum": 0.5, "sains": 0.3, "seni": 0.2}
    assert any("adding rows may move boundary rows" in note for note in plan.notes)


def test_settings_without_effect_are_told(rows_file: Path, tmp_path: Path) -> None:
    notes = data(rows_file, tmp_path, split="none", group_by="question").make_plan().notes
    assert "WARNING: data.group_by has no effect: no rows are split here" in notes


def test_everything_wrong_is_told_at_once(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        data(
            *(rows_file, tmp_path),
            near_duplicates=3.0,
            epochs=0,
            max_rows={"foo": 1},
            split={"train": 0.5},
        )
    assert len(told.value.problems) == 4


def test_rows_that_are_all_too_long_are_told(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows are left for train"):
        data(rows_file, tmp_path, max_length=5, truncation="drop").prepare_data()


def test_documents_in_the_system_turn_are_part_of_the_prompt(tmp_path: Path) -> None:
    def chat(text: str) -> dict[str, Any]:
        turns = [("system", text), ("user", "Ringkas dokumen ini."), ("assistant", "baik")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rng = np.random.default_rng(0)
    documents = [" ".join(f"kata{n}" for n in rng.integers(0, 500, 30)) for _ in range(200)]
    own, shared = (write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (
        ("own", [chat(text) for text in documents]),
        ("shared", [chat("Jawab singkat.") for _ in range(200)]),
    ))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options: dict[str, Any] = {"prompt": None, "completion": None, "split": None}
    module = data(own, tmp_path, **options)
    module.tokenizer_source = str(tmp_path / "tokenizer")
    plan = module.make_plan()
    assert plan.num_rows["test"] > 5
    assert module.prepared.facts["audit"]["leakage"]["num_pairs"] == 0
    one = data(shared, tmp_path, **options)
    one.tokenizer_source = str(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no rows are left for"):
        one.prepare_data()  # one and the same prompt cannot stand on two sides


@pytest.mark.parametrize("damage", ["max_length", "facts", "train", "validation", "state", "arrow"])
def test_a_damaged_cache_is_made_anew(rows_file: Path, tmp_path: Path, damage: str) -> None:
    def opened() -> SFTData:
        module = data(rows_file, tmp_path, split=None)
        module.setup("test")
        return module

    first = opened()
    tokens = tmp_path / "cache" / "tokens"
    assert first.sealed_test is not None
    sealed = first.sealed_test.folder / first.sealed_test.key
    if damage == "max_length":
        next(tokens.glob("*.max_length")).write_text("")
    elif damage == "facts":
        facts = next(tokens.glob("*/facts.json"))
        facts.write_text(facts.read_text()[:50])
    elif damage in ("train", "validation"):
        shutil.rmtree(next(tokens.glob(f"*/{damage}")))
    else:
        file = next(sealed.glob("state.json" if damage == "state" else "*.arrow"))
        file.unlink()  # the first module has it mapped into memory
        file.write_bytes(b"")
        with pytest.raises(UserError, match="the sealed test split was changed"):
            opened()
        shutil.rmtree(sealed)
    assert opened().rows("test").to_list() == first.rows("test").to_list()


def test_what_killed_preparations_left_is_cleared(rows_file: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".reading-999999999-abc"
    left.mkdir(parents=True)
    data(rows_file, tmp_path).prepare_data()
    assert not list((tmp_path / "cache").glob(".reading-*"))


def test_two_processes_prepare_the_same_data_at_once(rows_file: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fine_tune.data import SFTData; "
        f"SFTData(path={str(rows_file)!r}, prompt='{{question}}', completion='{{answer}}', "
        f"tokenizer={str(TOKENIZER)!r}, cache_dir={str(tmp_path / 'cache')!r}, "
        "max_length=int(sys.argv[1]) or None).prepare_data()"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, length], stderr=subprocess.PIPE, text=True)
        for length in ("0", "128", "0")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
