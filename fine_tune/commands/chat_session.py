"""A conversation: what was asked and answered, what of it fits the model, and the commands that change it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fine_tune.errors import UserError, nearest
from fine_tune.sampling import Sampling

COMMANDS = {
    "/help": "show these commands",
    "/reset": "forget the conversation",
    "/undo": "take the last question and its answer back",
    "/retry": "ask the last question again",
    "/system TEXT": "set the system message; without a text, remove it",
    "/temperature X": "0 for the likeliest words, higher for more surprising ones",
    "/save FILE": "write the conversation as rows of messages (.jsonl)",
    "/quit": "leave",
}
LEAST_ROOM = 4  # an answer is left at least this part of the model's positions


@dataclass
class Exchange:
    """A question and its answers: the model's, and in a comparison the base's before it.

    ``fields`` fill the prompt template of a run that has one; ``tries`` counts how often it was asked.
    """

    text: str
    fields: dict[str, str]
    answers: list[str] = field(default_factory=list)
    tries: int = 0


@dataclass
class Session:
    """The state of a chat.

    Args:
        model: A ``ChatModel``.
        sampling: How it answers; ``max_new_tokens`` is set.
        system: The system message.
    """

    model: Any
    sampling: Sampling
    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, exchange: Exchange, side: int, start: int) -> list[dict[str, str]]:
        """Return the conversation up to a question, as one side has it.

        Args:
            exchange: The question; those before it are the conversation.
            side: Whose answers: 0, or 1 for the second of a comparison.
            start: The first exchange that is kept.
        """
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for earlier in self.exchanges[start:]:
            if earlier is exchange:
                break
            turns += [
                {"role": "user", "content": earlier.text},
                {"role": "assistant", "content": earlier.answers[side]},
            ]
        return [*turns, {"role": "user", "content": exchange.text}]

    def prompt(self, exchange: Exchange, side: int) -> tuple[list[int], int, str]:
        """Return what the model is asked, the tokens its answer may have, and what the user must know.

        Raises:
            UserError: The question alone does not fit, or is no text.
        """
        for text in (exchange.text, *exchange.fields.values()):
            if (problem := not_text(text)) is not None:
                raise UserError(f"the question: {problem}")
        positions, wanted = self.model.positions, self.sampling.max_new_tokens
        assert wanted is not None
        room = min(wanted, positions // LEAST_ROOM) if positions else wanted
        last, in_turns = len(self.exchanges) - 1, self.model.kind == "messages"
        for start in range(0 if in_turns else last, last + 1):
            ids = self.model.prompt_ids(exchange.fields, self.messages(exchange, side, start))
            if not ids:
                raise UserError("the question is empty, and the model needs a word to begin with")
            if positions is None or len(ids) + room <= positions:
                cut = start if in_turns else 0
                note = f"the {cut} oldest questions no longer fit the model" if cut else ""
                return ids, min(wanted, (positions or 2**31) - len(ids)), note
        raise UserError(
            f"the question has {len(ids):,} tokens, more than the model's {positions:,} positions leave room for"
        )

    def key(self, exchange: Exchange) -> tuple[int, int]:
        """Return what makes an answer's random numbers its own: the question's number, and how often it was asked."""
        return self.exchanges.index(exchange), exchange.tries

    def undo(self) -> str:
        if not self.exchanges:
            return "there is nothing to take back"
        return f"taken back: {self.exchanges.pop().text}"

    def set_temperature(self, text: str) -> str:
        try:
            self.sampling = replace(self.sampling, temperature=float(text))
        except (ValueError, UserError):
            return f"temperature: a number from 0 up is wanted, got {text!r}"
        return f"temperature {self.sampling.temperature:g}"

    def set_system(self, text: str) -> str:
        if self.model.kind != "messages":
            return "this run has no system message: its rows are no conversations"
        if (problem := not_text(text)) is not None:
            return problem
        self.system = text
        return "system message set" if text else "no system message"

    def save(self, name: str) -> str:
        """Write the conversation, or each question with its answer, as rows of messages."""
        if not name:
            return "/save FILE: the name of a file is wanted, like chat.jsonl"
        if not self.exchanges:
            return "there is nothing to save"
        last = self.exchanges[-1]
        if self.model.kind == "messages":
            answered = {"role": "assistant", "content": last.answers[-1]}
            rows = [[*self.messages(last, -1, 0), answered]]
        else:
            rows = [
                [
                    {"role": "user", "content": e.text},
                    {"role": "assistant", "content": e.answers[-1]},
                ]
                for e in self.exchanges
            ]
        try:
            with open(Path(name).expanduser(), "x", encoding="utf-8") as handle:
                for row in rows:
                    handle.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")
        except FileExistsError:
            return f"'{name}' exists already, and is left as it is; give another name"
        except (OSError, ValueError, RuntimeError) as error:  # ~nobody has no home
            return f"'{name}' cannot be written: {getattr(error, 'strerror', None) or error}"
        return f"saved {len(rows)} row{'s' if len(rows) > 1 else ''} in {name}"


def not_text(text: str) -> str | None:
    """Say what a tokenizer cannot read: a typed byte that is not UTF-8, which Python keeps as U+DC80 to U+DCFF, or
    another half of a character; None where there is neither.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        if 0xDC80 <= half <= 0xDCFF:
            place = len(text[: error.start].encode())
            return f"not UTF-8 (byte {half - 0xDC00:#x} at {place}); convert it"
        return f"half a character (\\u{half:04x}), which no text can hold"
    return None


def help_lines() -> Sequence[str]:
    """List the commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return [*lines, "  //text".ljust(width + 4) + "a question that begins with /"]


def unknown_command(name: str) -> str:
    """Say that there is no such command, and the nearest one."""
    known = [command.split()[0] for command in COMMANDS]
    return f"no command {name}{nearest(name, known)}; /help lists them"
