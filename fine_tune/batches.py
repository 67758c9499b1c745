"""What data hands to modules: the batch of one optimizer step, and the plan of the whole run.

Shape letters: B rows of the batch, T tokens of its longest row.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor


class SFTBatch(TypedDict):
    """All rows of one optimizer step on this rank, longest first, padded on the right.

    ``labels_BT`` is aligned with ``input_ids_BT`` (not shifted); ``IGNORE_INDEX`` carries no loss. ``lengths``,
    ``num_supervised`` and ``row_ids`` (one entry per row) stay on the host, so that cutting micro-batches never waits
    for the device.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    lengths: list[int]
    num_supervised: list[int]
    row_ids: list[int]


class PreferenceBatch(TypedDict):
    """All pairs of one optimizer step on this rank, longest first, padded on the right.

    A row of ``input_ids_BT`` holds a prompt, the chosen answer and the rejected answer, one after the other;
    ``labels_BT`` is aligned with it, not shifted. The first ``num_prompt`` tokens are the prompt's, the next
    ``num_chosen`` those of the chosen answer; ``lengths`` counts all three, ``num_supervised`` the tokens that carry
    loss. ``margins`` are the data's, 0 without.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    lengths: list[int]
    num_prompt: list[int]
    num_chosen: list[int]
    num_supervised: list[int]
    margins: list[float]
    row_ids: list[int]


class PredictBatch(TypedDict):
    """Rows to answer or to score, longest first, whole and without padding: the module decides how many fit at once.

    ``items`` are the rows' places in the data module's list. ``ids`` holds the tokens of each, as arrays on the host.
    """

    items: list[int]
    ids: list[Any]
    lengths: list[int]
    stop_ids: list[int]


@dataclass(frozen=True)
class Choice:
    """A setting the user left open, the value a rule gives it, and why."""

    value: Any
    reason: str


@dataclass
class DataPlan:
    """What a module, a callback or the summary may know of the data.

    Args:
        num_rows: Rows kept per split.
        num_tokens: Tokens per split (one pass, no padding).
        num_supervised: Tokens that carry loss, per split (one pass).
        longest_row: Tokens of the longest row per split; of a pair, of its prompt with its longer answer.
        max_length: Tokens a row may have; longer rows were truncated by policy.
        batch_size: Rows per optimizer step over all ranks.
        max_tokens_per_micro_batch: Padded tokens per forward pass on one device; None means the whole step at once.
        steps_per_epoch: Optimizer steps per data epoch.
        num_steps: Optimizer steps the run takes in total.
        planned_steps: Optimizer steps the epochs hold, before ``trainer.max_steps`` cuts them.
        largest_token_id: Largest id in any row, to be held against the model's vocabulary.
        test_hash: Identity of the sealed test split, by the content of its rows; None without one.
        unread_margins: Pairs whose margin is no number.
        num_bytes: Bytes of text per split, where rows are texts.
        choices: What rules give to settings left open, by key (``data.max_length``, ``model.gradient_checkpointing``).
        notes: Lines for the start summary (truncated, dropped, cached ...).
    """

    num_rows: dict[str, int]
    num_tokens: dict[str, int]
    num_supervised: dict[str, int]
    longest_row: dict[str, int]
    max_length: int
    batch_size: int
    max_tokens_per_micro_batch: int | None
    steps_per_epoch: int
    num_steps: int
    planned_steps: int
    largest_token_id: int
    test_hash: str | None = None
    unread_margins: int = 0
    num_bytes: dict[str, int] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepFailure:
    """Why rows gave no usable result; weights and optimizer are as they were before.

    Args:
        kind: ``out_of_memory``, or ``non_finite``: the loss or the gradient is infinite or no number.
        stage: ``step`` (forward and backward), ``optimizer``, ``evaluation`` or ``generation``.
        step: The optimizer step, from 1.
        row_ids: The rows of the step, over all ranks.
        lengths: Their tokens.
        rows_at_once: Rows taken at once that did not fit; of several ranks' the fewest tokens, a row alone only where
            no rank failed with more.
        tokens_at_once: Their padded tokens.
        loss: The step's loss, where there is one.
    """

    kind: str
    stage: str
    step: int
    row_ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows_at_once: int = 0
    tokens_at_once: int = 0
    loss: float = float("nan")

    @property
    def on_all_ranks(self) -> bool:
        """Whether all ranks have agreed on it: those of a training step; what one rank evaluates is its own matter."""
        return self.stage in ("step", "optimizer")


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers that stayed on the host as a tensor on a device, without waiting for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def data_of(trainer: Any) -> Any:
    """Return the run's data module: ``plan``, ``tokenizer`` and ``rows(split)`` are what others may use of it."""
    return trainer.datamodule


def plan_of(trainer: Any) -> DataPlan:
    """Return what the data module planned for the run."""
    plan: DataPlan = trainer.datamodule.plan
    return plan


def log_interval(trainer: Any) -> int:
    """Return the optimizer steps between two rows of ``metrics.csv``."""
    return int(trainer.log_every_n_steps)


def cut_by_tokens(lengths: list[int], max_tokens: int | None) -> list[slice]:
    """Cut the rows of a batch, longest first, into micro-batches of at most ``max_tokens`` padded tokens.

    A row longer than ``max_tokens`` gets a micro-batch of its own: ``cut_by_tokens([5, 4, 2, 2], 8)`` gives rows
    ``[0:1], [1:3], [3:4]`` (5, then 2 x 4, then 2 padded tokens).

    Args:
        lengths: Tokens per row, in descending order.
        max_tokens: The budget; None for one micro-batch.
    """
    cuts, start = [], 0
    while start < len(lengths):
        rows = len(lengths) if max_tokens is None else max(1, max_tokens // lengths[start])
        stop = min(len(lengths), start + rows)
        cuts.append(slice(start, stop))
        start = stop
    return cuts


def most_tokens_at_once(lengths: list[int], max_tokens: int | None) -> int:
    """Return the padded tokens of the largest micro-batch that ``cut_by_tokens`` makes; 0 without rows."""
    cuts = cut_by_tokens(lengths, max_tokens)
    return max((lengths[cut.start] * (cut.stop - cut.start) for cut in cuts), default=0)
