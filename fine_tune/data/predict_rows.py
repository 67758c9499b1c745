"""A file of rows -> prompts to answer or answers to score, in the order of the file, with every field as it stood."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from fine_tune.data.encode import Encoder, Segment, truncate
from fine_tune.data.files import JSON_ROW, fields_of, rows_of
from fine_tune.data.formats import Example
from fine_tune.data.options import Options
from fine_tune.data.parts import MAX_ROW_ERRORS
from fine_tune.data.prompts import (
    CHAT_FORMATS,
    USER_TURN,
    asked,
    asked_segments,
    prompt_format,
    stop_ids,
    trained_format,
)
from fine_tune.data.scored import scored_answers
from fine_tune.data.sources import Source, fingerprint, locate_row, read_source
from fine_tune.data.templates import PREFERENCE, Row, RowError, template_fields
from fine_tune.errors import UserError, nearest

KEY = "data.predict_path"
NO_ROWS = f"{KEY}: none given; name the rows to predict, like --{KEY} rows.jsonl"
OURS = ("prediction", "finish_reason", "prompt_cut")
OURS_OF_SCORES = ("reward", "reward_chosen", "reward_rejected")


@dataclass(frozen=True)
class PredictItem:
    """Tokens for the model: a prompt, or a prompt with an answer to score.

    Args:
        row: Its row's place in the file, from 0.
        name: Field of the output that takes the result.
        input_ids: The tokens.
        num_cut: Tokens cut off the prompt's beginning.
    """

    row: int
    name: str
    input_ids: list[int]
    num_cut: int = 0


@dataclass(frozen=True)
class PredictRows:
    """All rows of a file.

    Args:
        lines: Each row as a JSON object, written as it stood.
        items: What the model gets, in the rows' order.
        lists: Rows whose result is a list, however long.
        stop_ids: Tokens that end an answer.
        content: SHA-256 of the file.
        is_text: Whether rows are texts to go on with.
        notes: What the user should read.
    """

    lines: list[str]
    items: list[PredictItem]
    stop_ids: set[int]
    content: str
    is_text: bool
    lists: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_predict_rows(
    path: str,
    sources: list[Source],
    options: Options,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_new_tokens: int | None,
) -> PredictRows:
    """Read and encode the rows of a file as the run's training rows were, up to the answer.

    Args:
        path: The file, folder or hub name.
        sources: The run's, for their templates; the first one whose prompt the rows have.
        options: The run's, for its truncation.
        tokenizer: The model's.
        max_length: Positions of the model; None for no limit.
        max_new_tokens: Tokens an answer may have; None: rows are scored, their answers included.

    Raises:
        UserError: Everything wrong with the file and its rows that can be told at once.
    """
    source = replace(sources[0], path=path, weight=1.0)
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tables = read_source(source, Path(scratch))
            if len(tables) > 1:
                raise UserError(f"{path}: it has the splits {', '.join(tables)}; name one file")
            split, table = next(iter(tables.items()))
            columns, batch = fields_of(table), table[:]
            rows = rows_of(batch)
            lines = [line.replace("\n", " ").replace("\r", " ") for line in batch.get(JSON_ROW, [])]
            content = fingerprint(source)
    except UserError as error:
        named = (problem.replace("data.path:", f"{KEY}:") for problem in error.problems)
        raise UserError(*named) from error
    lines = lines or [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    scores = max_new_tokens is None
    taken = [name for name in (OURS_OF_SCORES if scores else OURS) if name in columns]
    if taken:
        raise UserError(f"{path}: the rows have '{taken[0]}' already; rename that field")
    source, format_name, notes = _fitting_source(sources, columns, path, scores=scores)
    encoder = Encoder(tokenizer, max_length=max_length or 2**31, truncation=options.truncation)
    encoded = _Encoded(encoder, source, format_name, split)
    for index, row in enumerate(rows):
        encoded.add(index, row, scores=scores)
    items = encoded.items(max_length, max_new_tokens)
    num_cut = sum(item.num_cut > 0 for item in items)
    if num_cut:
        notes.append(
            f"WARNING: {num_cut:,} prompts are longer than the model's {max_length:,} positions leave room for; their "
            "beginnings are cut (data.truncation), by prompt_cut tokens"
        )
    return PredictRows(
        lines=lines,
        items=items,
        stop_ids=stop_ids(encoder, chat=encoded.chat),
        content=content,
        is_text=format_name == "text",
        lists=encoded.lists,
        notes=notes,
    )


class _Encoded:
    """Rows laid out as segments, with the errors on the way, and then encoded."""

    def __init__(self, encoder: Encoder, source: Source, format_name: str, split: str) -> None:
        self.encoder, self.source, self.format_name = encoder, source, format_name
        self.split, self.chat = split, format_name in CHAT_FORMATS
        self.errors: list[str] = []
        self.lists: set[int] = set()
        self._parts: list[tuple[int, str, list[Segment]]] = []

    def add(self, index: int, row: Row, *, scores: bool) -> None:
        try:
            guarded = self.encoder.guard(row)
            templates = self.source.templates
            if not scores:
                example = asked(guarded, self.format_name, templates)
                self._note(example)
                self._parts.append((index, "prediction", asked_segments(self.encoder, example)))
                return
            answers = scored_answers(guarded, templates)
            if answers.is_list:
                self.lists.add(index)
            for name, example in answers.examples:
                self._note(example)
                self._parts.append((index, name, self.encoder.segments(example)))
        except RowError as error:
            self._error(index, str(error))

    def items(self, max_length: int | None, max_new_tokens: int | None) -> list[PredictItem]:
        """Tokenize and cut; raises what went wrong with any row."""
        items: list[PredictItem] = []
        rows = self.encoder.ids_and_labels([part for _, _, part in self._parts], chat=self.chat)
        for (index, name, _), (ids, labels) in zip(self._parts, rows, strict=True):
            num_kept, num_cut = self.encoder.num_kept(ids), 0
            room = (max_length or 2**31) - (max_new_tokens or 0)
            if not ids:
                self._error(index, "the prompt is empty, and the first word needs one before it")
            elif len(ids) > room and self.encoder.truncation != "prompt_left":
                self._error(
                    index,
                    f"{len(ids):,} tokens are more than the model's {max_length:,} positions leave room for "
                    f"({room:,}); shorten it, or set data.truncation: prompt_left",
                )
            elif max_new_tokens is None:
                whole = truncate(ids, labels, room, "prompt_left", num_kept)
                if whole is None:
                    self._error(index, f"the answer alone fills the model's {max_length:,} tokens")
                    continue
                items.append(PredictItem(index, name, whole.input_ids, whole.num_cut))
                continue
            elif len(ids) > room:
                num_cut = len(ids) - room
                ids = ids[:num_kept] + ids[num_kept + num_cut :]
            items.append(PredictItem(index, name, ids, num_cut))
        if self.errors:
            raise UserError(*self.errors)
        return items

    def _note(self, example: Example) -> None:
        chat = "messages" in example
        if self._parts and chat != self.chat:
            raise RowError("some rows are conversations, others texts; give files of one kind")
        self.chat = chat

    def _error(self, index: int, text: str) -> None:
        self.errors.append(f"{locate_row(self.source, self.split, index)}: {text}")
        if len(self.errors) >= MAX_ROW_ERRORS:
            raise UserError(*self.errors)


def _fitting_source(
    sources: list[Source], columns: list[str], path: str, *, scores: bool
) -> tuple[Source, str, list[str]]:
    """Find the source of the run whose prompt the rows have."""
    problems: list[str] = []
    for source in sources:
        here = replace(source, path=path, weight=1.0)
        if scores:
            return here, PREFERENCE, []
        try:
            format_name = prompt_format(columns, source.templates, path)
        except UserError as error:
            problems += error.problems
            continue
        alone = "prompt" in columns and not {"messages", "chosen"} & set(columns)
        if alone and trained_format(source) in CHAT_FORMATS:
            format_name = USER_TURN
        missing = [] if format_name == PREFERENCE else list(_missing(here, format_name, columns))
        if not missing:
            note = f"rows are asked as those of {source.label}" if len(sources) > 1 else ""
            return here, format_name, [note] if note else []
        problems += missing
    raise UserError(*dict.fromkeys(problems))


def _missing(source: Source, format_name: str, columns: list[str]) -> Iterator[str]:
    """Name what the prompt wants that no row has."""
    wanted: dict[str, list[str]] = {
        "messages": ["messages"],
        "sharegpt": ["conversations"],
        "alpaca": ["instruction"],
        "text": ["text"],
        "prompt_completion": ["prompt"],
        USER_TURN: ["prompt"],
    }
    names = wanted[format_name]
    if format_name == "prompt_completion" and source.prompt is not None:
        names = template_fields(source.prompt, "data.prompt")
    for name in names:
        if name not in columns:
            yield (
                f"{source.path}: the run's prompt wants the field '{name}', the rows have {sorted(columns)}"
                f"{nearest(name, columns)}"
            )
