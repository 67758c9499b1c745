"""Another model's tokenizer is refused, though it has as many tokens; the model's own with more to it is not."""

from pathlib import Path

import pytest
from harness import CommandLine
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fine_tune.corpus import tokenizers
from fine_tune.errors import UserError
from fine_tune.models import load_tokenizer
from fine_tune.modules.tokenizer_check import tokenizer_problems


@pytest.fixture
def other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tokenizer of as many tokens, trained on other texts."""
    words = [f"{a}{b}{c}" for a in "qwxyz" for b in "aeiou" for c in "bcdfghjklmnpqrstvwxyz"]
    texts = [" ".join(words[i : i + 40]) for i in range(len(words))]
    folder = tmp_path / "other"
    tokenizers.save(tokenizers.train(texts, "bpe", len(tokenizer)), folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    return folder


def test_one_of_another_model_is_refused_before_weights_load(
    command_line: CommandLine, fit_args: list[str], other: Path, model_folder: Path
) -> None:
    outcome = command_line("fit", *fit_args, "--model.tokenizer", other)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"model.tokenizer: '{other}' is another model's tokenizer: " in outcome.err
    assert "ids stand for another token than in the one of" in outcome.err
    assert f"leave model.tokenizer out, or set --model.tokenizer {model_folder}" in outcome.err
    assert not outcome.run().path.exists()


def test_the_models_own_with_tokens_added_and_another_template_is_taken(
    command_line: CommandLine,
    fit_args: list[str],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<think>"]})
    tokenizer.add_tokens(["provinsi-provinsi"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "more")
    line = ["--model.tokenizer", tmp_path / "more", "--trainer.max_steps", 1]
    outcome = command_line("fit", *fit_args, *line)
    assert outcome.code == 0, outcome.err
    run = ["--model.model_name_or_path", outcome.run().path, "--trainer.max_steps", 1]
    again = command_line("fit", *fit_args, *run, "--model.tokenizer", tmp_path / "more")
    assert again.code == 0, again.err


def test_tokens_that_trade_places_are_seen_and_special_ones_may_have_another_name(
    model_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "tokenizer.json"
    model, text = str(model_folder), file.read_text("utf-8")
    file.write_text(text.replace('"<system>"', '"<sistem>"'), "utf-8")
    renamed = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert "<sistem>" in renamed.get_vocab()
    assert tokenizer_problems(renamed, "own", model, None) == []
    a, b = (tokenizer.get_vocab()[letter] for letter in "ab")
    traded = text.replace(f'"a": {a},', f'"a": {b},').replace(f'"b": {b},', f'"b": {a},')
    file.write_text(traded, "utf-8")
    (told,) = tokenizer_problems(
        AutoTokenizer.from_pretrained(tmp_path / "own"), "own", model, None
    )
    assert f"2 of {len(tokenizer) - 5:,} ids" in told
    assert f"(id {min(a, b)} is 'b', there 'a')" in told


def test_a_model_without_a_tokenizer_takes_any(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    assert tokenizer_problems(tokenizer, "any", str(tmp_path), None) == []
    assert tokenizer_problems(tokenizer, "any", None, None) == []


@pytest.mark.parametrize("config", ['{"tokenizer_class": "MarianTokenizer"}', "[1]"])
def test_a_models_own_that_cannot_be_loaded_here_is_compared_with_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, config: str
) -> None:
    """The one asks for a library that may not be installed, the other is damaged; both are told of when asked for."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "marian"}')
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert tokenizer_problems(tokenizer, "given", str(tmp_path), None) == []
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        load_tokenizer("model.tokenizer", str(tmp_path))
