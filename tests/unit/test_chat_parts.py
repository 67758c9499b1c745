"""The parts of a chat that need no model: whole characters, what fits, commands, two answers beside each other."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fine_tune.commands.chat_output import TokenText, shown, side_by_side
from fine_tune.commands.chat_session import Exchange, Session
from fine_tune.errors import UserError
from fine_tune.sampling import Sampling


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass
class Model:
    """A model of which only the prompts matter: a token per letter."""

    kind: str = "messages"
    positions: int | None = 100

    def prompt_ids(self, question: dict[str, str], messages: list[dict[str, str]]) -> list[int]:
        texts = [turn["content"] for turn in messages]
        return [ord(c) for c in ("".join(texts) if self.kind == "messages" else question["prompt"])]


def session(**model: Any) -> Session:
    return Session(Model(**model), Sampling(max_new_tokens=40))


def ask(of: Session, text: str, answer: str = "") -> Exchange:
    exchange = Exchange(text, {"prompt": text}, [answer])
    of.exchanges.append(exchange)
    return exchange


def test_no_half_character_is_ever_shown() -> None:
    written = list("naïve 🌋 日本".encode())
    text = TokenText(Bytes())
    pieces = [text.more(written[: i + 1]) for i in range(len(written))]
    assert "".join(pieces) == "naïve 🌋 日本"
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_is_left_of_half_a_character_comes_at_the_end() -> None:
    text = TokenText(Bytes())
    half = list("é".encode())[:1]
    assert text.more(half) == ""
    assert text.more(half, ended=True) == "\ufffd"


def test_nothing_steers_the_terminal() -> None:
    assert shown("a\x1b[31mb\x07\rc\u202ed") == "a\\x1b[31mb\\x07\\rc\\u202ed"
    assert shown("a\u00a0b\n\tc 👩\u200d🔬") == "a b\n\tc 👩\u200d🔬"


def test_the_oldest_questions_go_when_the_conversation_no_longer_fits() -> None:
    of = session()
    for letter in "abc":
        ask(of, letter * 15, letter * 15)
    last = ask(of, "d" * 10)
    ids, room, note = of.prompt(last, 0)
    assert bytes(ids).decode() == "b" * 30 + "c" * 30 + "d" * 10
    assert room == 30 and note == "the 1 oldest questions no longer fit the model"


def test_a_question_that_does_not_fit_alone_is_refused() -> None:
    of = session()
    with pytest.raises(UserError, match="the question has 90 tokens"):
        of.prompt(ask(of, "a" * 90), 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kota \udcff", "not UTF-8 (byte 0xff at 5); convert it"),
        ("kota \ud800", "half a character (\\ud800), which no text can hold"),
    ],
)
@pytest.mark.parametrize("kind", ["messages", "prompt"])
def test_a_question_that_is_no_text_is_refused(kind: str, text: str, told: str) -> None:
    of = session(kind=kind)
    with pytest.raises(UserError) as refused:
        of.prompt(ask(of, text), 0)
    assert str(refused.value) == f"the question: {told}"


def test_a_system_message_that_is_no_text_is_refused() -> None:
    of = session()
    of.set_system("short")
    assert "half a character" in of.set_system("\ud800") and of.system == "short"


def test_a_prompt_run_asks_each_question_alone() -> None:
    of = session(kind="prompt")
    ask(of, "first", "answer")
    ids, _, note = of.prompt(ask(of, "second"), 0)
    assert bytes(ids).decode() == "second" and note == ""
    assert "no system message" in of.set_system("x")


def test_each_side_of_a_comparison_has_its_own_answers() -> None:
    of = session(positions=None)
    of.exchanges.append(Exchange("q", {"prompt": "q"}, ["base", "tuned"]))
    last = ask(of, "next")
    contents = [[turn["content"] for turn in of.messages(last, side, 0)] for side in (0, 1)]
    assert contents == [["q", "base", "next"], ["q", "tuned", "next"]]


def test_a_conversation_is_saved_as_messages_and_never_over_a_file(tmp_path: Path) -> None:
    of, file = session(), tmp_path / "chat.jsonl"
    assert of.save(str(file)) == "there is nothing to save"
    of.set_system("short")
    ask(of, "one", "1")
    ask(of, "two", "2")
    assert of.save(str(file)).startswith("saved 1 row in")
    turns = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 2]
    assert "exists already" in of.save(str(file))
    assert "cannot be written" in of.save(str(tmp_path / "no" / "chat.jsonl"))
    assert "cannot be written" in of.save("~nosuchuser/chat.jsonl")
    assert of.undo() == "taken back: two" and len(of.exchanges) == 1


def test_a_narrow_terminal_stacks_the_answers() -> None:
    def laid_out(width: int) -> str:
        file = io.StringIO()
        Console(file=file, width=width).print(side_by_side(["eins", "[bold]zwei\x1b"], width))
        return file.getvalue()

    wide, narrow = laid_out(100), laid_out(60)
    assert any("eins" in line and "[bold]zwei\\x1b" in line for line in wide.splitlines())
    assert not any("eins" in line and "zwei" in line for line in narrow.splitlines())
    assert "before this run:" in narrow
