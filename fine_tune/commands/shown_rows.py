"""A row as the terminal shows it: its text, supervised tokens marked, nothing in it that could steer the terminal."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fine_tune.losses import IGNORE_INDEX
from fine_tune.printable import printable


def shown_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, title: str) -> Text:
    """Lay out an encoded row.

    Args:
        row: As the cache holds it: ``input_ids``, ``labels``, ``num_supervised`` ...
        tokenizer: Turns ids into text.
        title: Stands before the counts.
    """
    special = set(tokenizer.all_special_ids)
    shown = Text(f"{title}: {len(row['input_ids'])} tokens, ")
    shown.append(f"supervised {row['num_supervised']}", style="bold green").append("\n")
    second = row["num_prompt"] + row["num_chosen"]  # where a pair's rejected answer begins
    for ids, supervised in _runs(row["input_ids"], _labels(row), second):
        stop = supervised and ids[-1] in special
        text = printable(str(tokenizer.decode(ids[:-1] if stop else ids)), keep="\n\t")
        shown.append(
            f"\u00ab{text}\u00bb" if supervised else text, "green" if supervised else "dim"
        )
        if stop:
            stop_text = printable(str(tokenizer.decode(ids[-1:])))
            shown.append(f"[stop {stop_text}]", style="bold reverse green")
    return shown.append("\n")


def _labels(row: dict[str, Any]) -> list[int]:
    """Return a row's labels; of packed texts everything but the first token of each piece."""
    if "pieces" not in row:
        labels: list[int] = row["labels"]
        return labels
    starts = {0, *accumulate(row["pieces"])}
    return [IGNORE_INDEX if at in starts else token for at, token in enumerate(row["input_ids"])]


def _runs(input_ids: list[int], labels: list[int], second: int) -> Iterator[tuple[list[int], bool]]:
    start = 0
    for end in range(1, len(labels) + 1):
        supervised = labels[start] != IGNORE_INDEX
        ends = end in (second, len(labels))
        if ends or (labels[end] != IGNORE_INDEX) != supervised:
            yield input_ids[start:end], supervised
            start = end
