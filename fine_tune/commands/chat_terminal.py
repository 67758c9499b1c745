"""A chat in the terminal: lines typed, answers as they come, Ctrl-C, two answers side by side."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live

from fine_tune.commands.chat_output import TokenText, shown, side_by_side
from fine_tune.commands.chat_session import Exchange, Session, help_lines, unknown_command
from fine_tune.data.templates import RowError
from fine_tune.device_memory import MEMORY_ERRORS, is_out_of_memory
from fine_tune.errors import UserError

ASK = "you> "


class Interrupts:
    """Ctrl-C while an answer is written: the first ends it, one more leaves the chat."""

    def __init__(self) -> None:
        self.asked = False

    def _on_signal(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator["Interrupts"]:
        """Listen while entered."""
        self.asked = False
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


class Terminal:
    """Ask and answer until the user leaves.

    Args:
        session: The conversation.
        compare: Whether every question is answered twice.
    """

    def __init__(self, session: Session, *, compare: bool) -> None:
        self.session, self.compare = session, compare
        self.interrupts = Interrupts()
        if sys.stdin is None:
            raise UserError(
                "chat: there is no standard input to read questions from; give one by --once"
            )
        self.is_interactive = sys.stdin.isatty()
        self.console = Console(highlight=False, markup=False)

    def run(self) -> None:
        """Read lines until /quit, Ctrl-D, or Ctrl-C at the prompt."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            _line_editing()
            _keep_any_byte()
            while (line := self._read(ASK)) is not None:
                if not self._take(line.strip()):
                    return
        except KeyboardInterrupt:
            print()
        finally:
            signal.signal(signal.SIGINT, before)

    def once(self, text: str) -> None:
        """Answer one question, and print nothing else."""
        self.is_interactive = False
        exchange = Exchange(text, _fields(self.session, text))
        self._ask(exchange)

    def _take(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        session = self.session
        if line.startswith("/") and not line.startswith("//"):
            if name in ("/quit", "/exit"):
                return False
            if name == "/help":
                self.note(*help_lines())
            elif name == "/reset":
                session.exchanges.clear()
                self.note("the conversation is forgotten")
            elif name == "/undo":
                self.note(session.undo())
            elif name == "/retry":
                self._retry()
            elif name == "/system":
                self.note(session.set_system(rest))
            elif name == "/temperature":
                self.note(session.set_temperature(rest))
            elif name == "/save":
                self.note(session.save(rest))
            else:
                self.note(unknown_command(name))
            return True
        if line:
            text = line.removeprefix("/") if line.startswith("//") else line
            fields = self._more_fields(text)
            if fields is not None:
                self._ask(Exchange(text, fields))
        return True

    def _retry(self) -> None:
        if not self.session.exchanges:
            self.note("there is nothing to ask again")
            return
        last = self.session.exchanges.pop()
        if self.session.sampling.temperature == 0:
            self.note("at temperature 0 the answer is the same; see /temperature")
        self._ask(Exchange(last.text, last.fields, tries=last.tries + 1))

    def _more_fields(self, text: str) -> dict[str, str] | None:
        first, *others = self.session.model.fields
        fields = {first: text}
        for name in others:
            value = self._read(f"{shown(name)}> ")
            if value is None:
                return None
            fields[name] = value
        return fields

    def _ask(self, exchange: Exchange) -> None:
        """Answer a question; it stays in the conversation, also where its answer was stopped."""
        session = self.session
        session.exchanges.append(exchange)
        sides = (0, 1) if self.compare else (0,)
        try:
            asked = [session.prompt(exchange, side) for side in sides]
        except (UserError, RowError) as error:
            session.exchanges.remove(exchange)
            if not self.is_interactive:
                raise UserError(str(error)) from error
            self.note(str(error))
            return
        for note in dict.fromkeys(note for _, _, note in asked if note):
            self.note(note)
        streams = [
            session.model.stream(
                ids,
                replace(session.sampling, max_new_tokens=max_new_tokens),
                session.key(exchange),
                base=self.compare and side == 0,
            )
            for side, (ids, max_new_tokens, _) in zip(sides, asked, strict=True)
        ]
        try:
            with self.interrupts.listening():
                exchange.answers = self._two(streams) if self.compare else [self._one(streams[0])]
        except MEMORY_ERRORS as error:
            session.exchanges.remove(exchange)
            if not is_out_of_memory(error):
                raise
            told = "out of memory: ask less at once, or /reset the conversation"
            if not self.is_interactive:
                raise UserError(told) from error
            self.note(told)
        if self.interrupts.asked:
            self.note("(stopped)")

    def _one(self, stream: Iterator[Any]) -> str:
        text, answer = TokenText(self.session.model.tokenizer), None
        pieces: list[str] = []
        for answer in stream:
            piece = text.more(answer.written, ended=answer.ended is not None)
            if not pieces and self.session.model.kind != "text":
                piece = piece.lstrip()
            if piece:
                pieces.append(piece)
                print(shown(piece), end="", flush=True)
            if self.interrupts.asked:
                break
        print(flush=True)
        self._say_cut(answer)
        return "".join(pieces).strip()

    def _two(self, streams: list[Iterator[Any]]) -> list[str]:
        decode = self.session.model.tokenizer.decode
        answers: list[Any] = [None, None]

        def texts() -> list[str]:
            ids = [answer.written if answer is not None else [] for answer in answers]
            return [str(decode(of_one, skip_special_tokens=True)).strip() for of_one in ids]

        screen = Live(console=self.console, transient=True, auto_refresh=False)
        with screen if self.console.is_terminal else nullcontext() as live:
            going = [0, 1]
            while going and not self.interrupts.asked:
                for side in list(going):
                    answers[side] = next(streams[side], answers[side])
                    if answers[side].ended is not None:
                        going.remove(side)
                if live is not None:
                    live.update(side_by_side(texts(), self.console.width), refresh=True)
        for answer in answers:
            self._say_cut(answer)
        self.console.print(side_by_side(texts(), self.console.width))
        return texts()

    def _say_cut(self, answer: Any) -> None:
        if answer is not None and answer.ended == "length":
            self.note(f"(ended after {len(answer.written):,} tokens: --max_new_tokens)")

    def _read(self, ask: str) -> str | None:
        try:
            return input(ask if self.is_interactive else "")
        except EOFError:
            if self.is_interactive:
                print()
            return None

    def note(self, *lines: str) -> None:
        """Tell the user something that is no answer; a pipe gets answers alone."""
        for line in lines:
            print(shown(line), file=sys.stdout if self.is_interactive else sys.stderr, flush=True)


def _fields(session: Session, text: str) -> dict[str, str]:
    """Read the fields of a prompt: a JSON object where there are several."""
    names = session.model.fields
    if len(names) == 1:
        return {names[0]: text}
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict) or set(names) - set(given):
        raise UserError(
            f"once: the run's prompt has the fields {', '.join(names)}; give a JSON object of them"
        )
    return {name: str(given[name]) for name in names}


def _line_editing() -> None:
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it from then on)


def _keep_any_byte() -> None:
    """Let a line with a byte that is not UTF-8 come through, to be refused by name; most locales would raise."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
