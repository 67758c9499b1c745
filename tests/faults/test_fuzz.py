"""A short fuzz with a fixed seed, and one literal test for every defect that fuzzing found."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import fuzz, wrong_message
from harness import TOKENIZER, CommandLine, Outcome

from fine_tune.data import SFTData
from fine_tune.errors import UserError, in_brief
from fine_tune.prepared_cli import prepare_as_fit
from fine_tune.settings import read_yaml


def test_a_short_fuzz_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINE_TUNE_RUN_FOLDER", raising=False)
    done = fuzz(tmp_path, 60, seed=7)
    assert done.findings == []
    assert done.counts["data", 0] and done.counts["data", 2] and done.counts["config", 2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_fuzz_finds_nothing(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 3000, seed=11).findings == []


def refused(outcome: Outcome, *messages: str) -> None:
    assert outcome.code == 2, outcome.out
    assert wrong_message(outcome.err) == []
    for message in messages:
        assert message in outcome.err


# ---- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 0x_", "1: YAML: no such value"),
        ("name: !!timestamp x", "1: YAML: no such value"),
        ("name: &a {b: *a}", "1: YAML: an anchor that holds itself"),
        ("name: " + "[" * 60 + "]" * 60, "1: YAML: nested too deeply"),
        ("name: " + "[" * 5000, "YAML: nested too deeply"),
        ("data:\n  sources:\n  - {path: a,\n     path: b}", "4: duplicate key 'path'"),
        ("name:\n  ? [a]\n  : 1", "2: YAML: a key must be a word"),
    ],
)
def test_yaml_that_pyyaml_chokes_on_or_halves(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text + "\n")
    _, problems = read_yaml(str(tmp_path / "wrong.yaml"))
    assert any(message in problem for problem in problems), problems


def test_a_byte_order_mark_is_one_at_the_beginning_alone(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("\ufeffname: a\n", "utf-8")
    assert read_yaml(str(file))[1] == []
    file.write_text("name: a\ncheckpoint: {keep: \ufeff1}\n", "utf-8")  # which YAML makes 1 of
    _, problems = read_yaml(str(file))
    assert problems == [f"{file}:2: YAML: an invisible byte order mark (U+FEFF); remove it"]


def test_aliases_that_multiply(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 9)]
    (tmp_path / "wrong.yaml").write_text("\n".join(lines) + "\n")
    _, problems = read_yaml(str(tmp_path / "wrong.yaml"))
    assert "more than 10,000 values" in problems[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint", "[]"], "checkpoint: a mapping of keys is wanted, got []"),
        (["--trainer", "null"], "trainer: a mapping of keys is wanted, got None"),
        (["--generations", "2024-99-99"], "generations: a mapping of keys is wanted"),
        (["--generations", "- a"], "generations: a mapping of keys is wanted"),
        (["--checkpoint.class_path", "x"], "unknown flag '--checkpoint.class_path' of Checkpoints"),
        (["--trainer.plugins", '{"a": 1}'], "trainer.plugins"),
        (["--seed_everything", "{a: 1}"], "seed_everything: Expected a bool"),
        (["--targets", "x"], "targets: "),
        (["--trainer.deterministic", "a\x1b[31mb"], r"a\x1b[31mb"),
        (["--data.path", "{train: a, train: b}"], "data.path: duplicate key 'train'"),
        (["--data.tokenizer", "x"], "data.tokenizer: is the model's; set model.tokenizer"),
        (["--data.tokenizer_revision", "x"], "is the model's; set model.revision"),
        (["--data.split", "{}"], "data.split: is empty"),
        (["--name", "help", "--data.prompt"], "--data.prompt: a value is missing"),
        (["--name", "help", "--no_such", "1"], "unknown flag '--no_such'"),
        (["--model.tokenizer", "*odd"], "model.tokenizer: '*odd' is no folder, and no hub name"),
        (["--model.tokenizer", "x" * 300], "cannot be read: File name too long"),
        (['--trainer={"a": {"b": 1}}'], "--trainer: unknown key 'a' of Trainer"),
        (
            ['--early_stopping={"min_delta": null}'],
            "early_stopping.min_delta: null is not possible",
        ),
        (["--trainer.devices", str(2**63)], "trainer.devices: must be at most 1,024"),
        (["--model.lora.target_modules", "a[b"], "model.lora.target_modules: 'a[b' is no regular"),
        (["--data.path", "/"], "data.path: '/' is the whole file system"),
        (
            ["--trainer.profiler", "/nowhere"],
            "trainer.profiler: '/nowhere' is not known; use simple",
        ),
        (
            ["--model.attn_implementation", "a\x1b[31mb"],
            r"model.attn_implementation: 'a\x1b[31mb' is not known; use sdpa, eager",
        ),
        (
            ["--model.attn_implementation", "spda"],
            "model.attn_implementation: 'spda' is not known; did you mean 'sdpa'?",
        ),
        (["--model.config", "1: 2"], "model.config: LlamaConfig has no field '1'"),
        (["x" * 5000], f"error: '{'x' * 120}': a flag was expected here"),
        (["|\n  a\n"], r"error: '|\n  a\n': a flag was expected here"),
    ],
)
def test_flags_that_were_not_refused_cleanly(
    command_line: CommandLine, fit_args: list[str], args: list[str], message: str
) -> None:
    refused(command_line("fit", "--trainer.max_steps", 1, *fit_args, *args, root=False), message)


def test_a_class_that_is_none(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("data: -0.0\n")
    outcome = command_line("fit", "--config", tmp_path / "wrong.yaml")
    refused(outcome, "wrong.yaml:1: data: a class is wanted; set data.class_path")


@pytest.mark.parametrize("name", ["r", "lora_alpha", "lora_dropout"])
def test_a_number_of_lora_that_is_none(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(f"model: {{init_args: {{lora: {{{name}: null}}}}}}\n")
    outcome = command_line("fit", *fit_args, "--config", tmp_path / "wrong.yaml")
    refused(outcome, f"model.lora.{name}: a number is wanted, got None")


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("init_args: null", "weight: 1", "model.from_config: LlamaConfig has no field 'init_args'"),
        ("hidden_size: 16", "weight: null", "data.sources: the weight of a must be above 0"),
    ],
)
def test_null_where_a_line_was_doubled_or_cut(
    command_line: CommandLine, tmp_path: Path, model: str, source: str, message: str
) -> None:
    made = f"{{tokenizer: {TOKENIZER}, from_config: {{model_type: llama, {model}}}}}"
    (tmp_path / "wrong.yaml").write_text(
        f"model: {{class_path: SFT, init_args: {made}}}\n"
        f"data: {{class_path: SFTData, init_args: {{sources: [{{path: a, {source}}}]}}}}\n"
    )
    refused(command_line("fit", "--config", tmp_path / "wrong.yaml"), message)


@pytest.mark.parametrize("value", ["null", "'{}'", "[]"])
def test_a_section_that_is_no_mapping(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, value: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(f"generations: {value}\n")
    refused(
        command_line("fit", "--config", tmp_path / "wrong.yaml", *fit_args),
        "wrong.yaml:1: generations: a mapping of keys is wanted",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name: null", "name: null is not possible here; leave the key out for its default, 'run'"),
        ("seed_everything: null", "seed_everything: null is not possible here"),
        ("early_stopping: {min_delta: null}", "early_stopping.min_delta: null is not possible"),
        ("targets: '{}'", "targets: '{}' is a text; to mean {}, leave the quotes out"),
        ("ckpt_path: 'null'", "ckpt_path: 'null' is a text; to mean null, leave the quotes out"),
        ("trainer: {deterministic: 'yes'}", "trainer.deterministic: 'yes' is a text; to mean yes"),
        ("trainer: {plugins: '{}'}", "trainer.plugins: '{}' is a text"),
        ("data: {init_args: {cache_dir: 'null'}}", "data.cache_dir: 'null' is a text"),
        ("data: {init_args: {batch_size: 'null'}}", "data.batch_size: 'null' is a text"),
        (
            'data: {class_path: SFTData, init_args: {cache_dir: "a\\0b"}}',
            r"data.cache_dir: 'a\x00b/tokens' cannot be made",
        ),
        ("model: {init_args: {gradient_checkpointing: '~'}}", "gradient_checkpointing: '~' is a"),
        ("model: {init_args: {lora: {use_rslora: 'no'}}}", "model.lora: 'no' is a text"),
        ("model: {init_args: {lora: {target_modules: 1e3}}}", "model.lora: Expected a"),
        ("model: {init_args: {optimizer: {init_args: {lr: 1}}}}", "init_args without class_path"),
        ("model: {init_args: {optimizer: {lr: 1}}}", "model.optimizer: lr without class_path"),
        ("model: {class_path: ../x}", "'../x' is not a LightningModule"),
        ("checkpoint: {init_args: {lr: 1}}", "unknown key 'init_args' of Checkpoints"),
        ("trainer: {init_args: {optimizer: {lr: 1}}}", "unknown key 'init_args' of Trainer"),
    ],
)
def test_values_taken_for_others_or_dropped(
    command_line: CommandLine, fit_args: list[str], tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "wrong.yaml").write_text(f"{line}\n")
    refused(command_line("fit", "--config", tmp_path / "wrong.yaml", *fit_args), message)


def test_a_date_is_a_text_and_a_second_file_may_name_the_class(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a\nb\n")
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    sizes = "{model_type: llama, hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 1}"
    first.write_text(
        f"""\
name: 2024-01-01
model:
  class_path: fine_tune.modules.SFT
  init_args: {{from_config: {sizes}, tokenizer: {TOKENIZER}, optimizer: {{init_args: {{lr: 0.5}}}}}}
data:
  class_path: fine_tune.data.SFTData
  init_args: {{path: {tmp_path / "rows.txt"}, split: none}}
trainer: {{default_root_dir: {tmp_path}, accelerator: cpu}}
"""
    )
    second.write_text("model: {init_args: {optimizer: {class_path: torch.optim.SGD}}}\n")
    settings = prepare_as_fit(["--config", str(first), "--config", str(second)]).settings
    assert settings.name == "2024-01-01"
    assert settings.model.init_args.optimizer.class_path == "torch.optim.SGD"
    assert settings.model.init_args.optimizer.init_args.lr == 0.5


def test_messages_hold_no_control_characters_and_no_screens() -> None:
    assert in_brief("a\x1b[31m\tb\r\nc\u2028\ud800") == "a\\x1b[31m\tb\\r\nc\\u2028\\ud800"
    assert len(UserError("x" * 5000).problems[0]) == 2004


# ---- data


def prepared(folder: Path, path: Any, **options: Any) -> list[str]:
    """Prepare rows as ``fit`` does and return their texts."""
    options = {"prompt": "{question}", "completion": " {answer}", "split": "none", **options}
    data = SFTData(
        path=path if isinstance(path, dict) else str(path),
        tokenizer=str(TOKENIZER),
        cache_dir=str(folder / "cache"),
        **options,
    )
    rows = data.prepared.rows["train"]["input_ids"]
    return [data.tokenizer.decode(ids) for ids in rows]


def row(answer: str) -> str:
    return f'{{"question": "q", "answer": {answer}}}'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[" * 3000, ":1: broken JSON: nested too deeply"),
        ("1" * 5000, ":1: a number of 5,000 digits"),
        ("NaN", ":1: broken JSON: NaN is no JSON value"),
        ("-Infinity", ":1: broken JSON: -Infinity is no JSON value"),
        ('"\\ud83d"', r":1: half a character (\ud83d)"),
        ('1, "answer": 2', ":1: the field 'answer' stands twice in one object"),
    ],
)
def test_json_to_the_letter(tmp_path: Path, answer: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row(answer) + "\n")
    with pytest.raises(UserError) as told:
        prepared(tmp_path, tmp_path / "rows.jsonl")
    assert message in str(told.value)
    (tmp_path / "rows.json").write_text(f"[{row(answer)}]")
    with pytest.raises(UserError) as told:
        prepared(tmp_path, tmp_path / "rows.json")
    assert message.removeprefix(":1") in str(told.value)


def test_numbers_and_characters_stay_as_written(tmp_path: Path) -> None:
    answers = ["1.50", "1e400", "-0", '"\\ud83d\\ude00"', '"a, ]"']
    wanted = [f"q {answer}<eos>" for answer in ("1.50", "1e400", "-0", "\U0001f600", "a, ]")]
    (tmp_path / "rows.jsonl").write_text("".join(row(answer) + "\n" for answer in answers))
    assert prepared(tmp_path, tmp_path / "rows.jsonl") == wanted
    (tmp_path / "rows.json").write_text(f"[{' , '.join(map(row, answers))}\n]\n")
    assert prepared(tmp_path, tmp_path / "rows.json") == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "[]", "no rows; the data is empty"),
        ("rows.jsonl", " \n\t\n", "no rows; the data is empty"),
        ("rows.csv", "question,answer\n", "no rows; the data is empty"),
        ("rows.csv", "question,answer,answer\nq,1,2\n", "'answer' stands twice in the header"),
    ],
)
def test_tables_without_rows_and_fields_given_twice(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "must have 'from' in"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "'input' must be a text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "tool_calls": 7},
                ]
            },
            "tool_calls must be a list",
        ),
    ],
)
def test_values_of_odd_types(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(fields) + "\n")
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, tmp_path / "rows.jsonl", prompt=None, completion=None)


def test_parquet_texts_that_are_none(tmp_path: Path) -> None:
    file, good = tmp_path / "rows.parquet", pa.array(["q"])
    pq.write_table(
        pa.table({"question": good, "answer": pa.array([b"\xff"]).view(pa.string())}), file
    )
    with pytest.raises(UserError, match="Invalid UTF8"):
        prepared(tmp_path, file)
    pq.write_table(pa.table({"question": good, "answer": [float("nan")]}), file)
    with pytest.raises(UserError, match="must be a text or a number, got float nan"):
        prepared(tmp_path, file)
    pq.write_table(pa.table({"question": good, "answer": ["a"], "json_row": ["not JSON"]}), file)
    assert prepared(tmp_path, file) == ["q a<eos>"]


def test_a_folder_with_a_file_beside_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(row('"a"') + "\n")
    (folder / "dataset_info.json").write_text("{}")  # a description, left alone
    assert prepared(tmp_path, folder) == ["q a<eos>"]
    (folder / "more.jsonl").write_text(row('"b"') + "\n")
    with pytest.raises(UserError, match=r"more\.jsonl, which would not be read"):
        prepared(tmp_path, folder)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "inside.jsonl").mkdir(parents=True)
    (folder / "inside.jsonl" / "rows.jsonl").write_text(row('"a"') + "\n")
    assert prepared(tmp_path, folder) == ["q a<eos>"]
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl: a link that leads nowhere"):
        prepared(tmp_path, folder)
    (folder / "loop.jsonl").unlink()
    with open(os.fsencode(folder) + b"/caf\xe9.jsonl", "wb") as handle:
        handle.write(row('"a"').encode())
    with pytest.raises(UserError, match="the name is not UTF-8; rename it"):
        prepared(tmp_path, folder)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        prepared(tmp_path, tmp_path / ("x" * 300))


def test_one_split_under_two_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(row('"a"') + "\n")
    paths = dict.fromkeys(("train", "validation", "val"), str(file))
    with pytest.raises(UserError, match="two names of one split"):
        prepared(tmp_path, paths, split=None)
