"""Tokens and mask: prompts carry no loss, the stop token does, data stays text, truncation is counted."""

import pytest
from transformers import PreTrainedTokenizerBase

from fine_tune.data.encode import EncodedRow, Encoder, truncate
from fine_tune.data.formats import Example
from fine_tune.data.templates import RowError
from fine_tune.losses import IGNORE_INDEX

CHATML = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encode(encoder: Encoder, example: Example) -> EncodedRow:
    chat = "messages" in example
    row = encoder.encode([encoder.segments(encoder.guard(example))], chat=chat)[0]
    assert row is not None
    return row


def supervised_text(encoder: Encoder, row: EncodedRow) -> str:
    return encoder.tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])


def test_prompt_is_masked_and_the_stop_token_is_not(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, max_length=64)
    row = encode(encoder, {"prompt": "Ibu kota Indonesia adalah", "completion": " Jakarta"})
    prompt = tokenizer("Ibu kota Indonesia adalah")["input_ids"]
    assert row.input_ids[: len(prompt)] == prompt  # the very tokens the model is asked with later
    assert set(row.labels[: len(prompt)]) == {IGNORE_INDEX}
    assert row.labels[-1] == tokenizer.eos_token_id
    assert supervised_text(encoder, row) == " Jakarta<eos>"


def test_the_stop_token_is_supervised_when_pad_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    row = encode(Encoder(tokenizer, max_length=64), {"prompt": "a", "completion": " b"})
    assert row.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_special_tokens_in_data_stay_text(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, max_length=64)
    row = encode(encoder, {"prompt": "say <eos> please", "completion": " <eos>"})
    assert row.input_ids.count(tokenizer.eos_token_id) == 1  # the stop token alone
    assert tokenizer.decode(row.input_ids) == "say <eos> please <eos><eos>"


def test_special_tokens_in_chat_content_stay_text(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "user", "content": "ignore this <assistant>"},
        {"role": "assistant", "content": "no"},
    ]
    row = encode(Encoder(tokenizer, max_length=64), {"messages": turns, "tools": None})
    assistant = tokenizer.convert_tokens_to_ids("<assistant>")
    assert row.input_ids.count(assistant) == 1


@pytest.mark.parametrize("template", [None, CHATML], ids=["marked", "unmarked"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_assistant_turns_and_their_stop_tokens_carry_loss(
    tokenizer: PreTrainedTokenizerBase, template: str | None, turns: str
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    encoder = Encoder(tokenizer, max_length=64, assistant_turns=turns)  # type: ignore[arg-type]
    messages = [
        {"role": "user", "content": "satu"},
        {"role": "assistant", "content": "dua"},
        {"role": "user", "content": "tiga"},
        {"role": "assistant", "content": "empat"},
    ]
    row = encode(encoder, {"messages": messages, "tools": None})
    learned = supervised_text(encoder, row).replace("\n", "")
    assert learned == ("dua<eos>empat<eos>" if turns == "all" else "empat<eos>")
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert row.input_ids == rendered["input_ids"]


def test_a_template_that_rewrites_earlier_turns_says_what_to_set(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}"
        "{% endif %}{{ eos_token }}{% endfor %}"
    )
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(RowError, match="assistant_turns: last"):
        Encoder(tokenizer, max_length=64).segments({"messages": turns, "tools": None})


def test_a_bos_is_put_once(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.convert_tokens_to_ids("<user>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", bos)]
    )
    encoder = Encoder(tokenizer, max_length=64)
    row = encode(encoder, {"prompt": "a", "completion": " b"})
    assert row.input_ids[0] == bos
    assert row.input_ids.count(bos) == 1
    again = encoder.encode(
        [encoder.segments({"prompt": "<user>a", "completion": " b"})], chat=False
    )[0]
    assert again is not None
    assert again.input_ids == row.input_ids


def test_plain_text_learns_every_token(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(Encoder(tokenizer, max_length=64), {"text": "Jakarta adalah ibu kota."})
    assert row.labels == row.input_ids
    assert row.labels[-1] == tokenizer.eos_token_id


def test_truncation_policies() -> None:
    ids, labels = [1, 2, 3, 4, 5], [-100, -100, -100, 4, 5]
    assert truncate(ids, labels, 5, "drop") == EncodedRow(ids, labels)
    assert truncate(ids, labels, 4, "drop") is None
    assert truncate(ids, labels, 4, "prompt_left") == EncodedRow(ids[1:], labels[1:], 1, 0)
    assert truncate(ids, labels, 2, "prompt_left") is None  # no token would be left to predict from
    assert truncate(ids, labels, 4, "completion_right") == EncodedRow(ids[:4], labels[:4], 1, 1)


def test_tools_reach_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ tools[0].function.name if tools else 'no tools' }}" + CHATML
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = Encoder(tokenizer, max_length=64)
    tools = [{"type": "function", "function": {"name": "cuaca", "parameters": {}}}]
    row = encode(encoder, {"messages": turns, "tools": tools})
    assert tokenizer.decode(row.input_ids).startswith("cuaca<user>a")


def test_a_tokenizer_that_adds_a_space_is_cut_by_characters() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "\u2581tanya", "\u2581:", "\u2581jawab", "\u2581ya", "\u2581"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    row = encode(Encoder(spaced, max_length=16), {"prompt": "tanya :", "completion": " jawab ya"})
    assert [words[i] for i in row.input_ids] == [words[2], words[3], words[4], words[5], "</s>"]
    assert row.labels[:2] == [IGNORE_INDEX] * 2
    assert row.labels[2:] == row.input_ids[2:]
