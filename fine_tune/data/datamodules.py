"""The LightningDataModule: prepares rows, plans the run's steps, and hands out one batch per optimizer step."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fine_tune.batches import DataPlan
from fine_tune.data.collate import SFTCollator
from fine_tune.data.encode import AssistantTurns, Truncation
from fine_tune.data.formats import FormatName
from fine_tune.data.prepare import Options, PreparedData, prepare
from fine_tune.data.sources import Source
from fine_tune.data.split import SPLITS, check_split
from fine_tune.data.steps import StepLoader, StepSampler, evaluation_batches, rows_per_epoch
from fine_tune.errors import UserError
from fine_tune.models import load_tokenizer

DEFAULT_MAX_LENGTH = 1024


class SFTData(LightningDataModule):
    """Rows for supervised fine-tuning.

    Args:
        path: A file (.jsonl, .json, .csv, .parquet, .txt), a folder, a saved ``datasets`` folder, a hub name, or one
            of these per split: ``{train: a.jsonl, validation: b.jsonl, test: c.jsonl}``.
        sources: Several sources, each with path, format, weight, prompt, completion; instead of ``path``.
        format: How to read a row; None detects it from the templates and fields.
        prompt: Template of the prompt over a row's fields, like ``"Question: {question}"``. It carries no loss.
        completion: Template of the completion, like ``" {answer}"``. It carries loss, and so does the stop token.
        split: Ratios ``{train: 0.8, validation: 0.1, test: 0.1}`` by a hash of the prompt (the default for data
            without splits), row counts ``{validation: 500, test: 500}``, ``existing``, or ``none`` (all rows train).
        batch_size: Rows per optimizer step, over all ranks.
        max_tokens_per_micro_batch: Padded tokens per forward pass on one device: lower it when memory is short, the
            result stays the same. None: the whole step at once.
        max_length: Tokens a row may have. None: 1024, or the model's positions if it has fewer.
        truncation: Longer rows: ``prompt_left`` cuts the prompt's beginning, ``completion_right`` the end, ``drop``
            leaves them out. Counted and printed.
        assistant_turns: Which assistant turns of a conversation carry loss: all, or the last.
        epochs: Passes over the training rows. None: 1, or as many as ``trainer.max_steps`` takes.
        max_rows: At most so many rows per split (the first ones): ``{train: 5000}`` or one number for all.
        eval_batch_size: Rows per validation or test batch; the result does not depend on it. None: ``batch_size``.
        num_workers: Processes that prepare batches ahead, per device.
        seed: Decides the order of the rows; the splits do not depend on it.
        revision: Revision of a hub data set.
        cache_dir: Where prepared tokens are kept. None: ``.cache`` beside the runs.
        tokenizer: Folder or hub name; set from the model's by the command line.
        tokenizer_revision: Its revision on the hub; set likewise.
    """

    def __init__(
        self,
        path: str | dict[str, str] | None = None,
        sources: list[Source] | None = None,
        format: FormatName | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        split: Literal["existing", "none"] | dict[str, float] | None = None,
        batch_size: int = 8,
        max_tokens_per_micro_batch: int | None = None,
        max_length: int | None = None,
        truncation: Truncation = "prompt_left",
        assistant_turns: AssistantTurns = "all",
        epochs: int | None = None,
        max_rows: int | dict[str, int] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        revision: str | None = None,
        cache_dir: str | None = None,
        tokenizer: str | None = None,
        tokenizer_revision: str | None = None,
    ) -> None:
        super().__init__()
        self.sources = _sources(path, sources, format, prompt, completion, revision)
        _check_sizes(
            {
                "batch_size": batch_size,
                "max_tokens_per_micro_batch": max_tokens_per_micro_batch,
                "max_length": max_length,
                "epochs": epochs,
                "eval_batch_size": eval_batch_size,
            }
        )
        if num_workers < 0 or not 0 <= seed < 2**63:
            raise UserError(
                f"data: num_workers {num_workers} and seed {seed} must not be negative, nor the seed above 2^63"
            )
        if isinstance(split, dict):
            check_split(split)
        limits = (
            {name: max_rows for name in SPLITS}
            if isinstance(max_rows, int)
            else dict(max_rows or {})
        )
        if any(name not in SPLITS or limit < 1 for name, limit in limits.items()):
            raise UserError(
                f"data.max_rows: {max_rows}; give a number above 0, or one for each of {', '.join(SPLITS)}"
            )
        self.options = Options(
            max_length=max_length or DEFAULT_MAX_LENGTH,
            truncation=truncation,
            assistant_turns=assistant_turns,
            split=split,
            max_rows=limits,
        )
        self.max_length = max_length
        self.batch_size, self.max_tokens_per_micro_batch = batch_size, max_tokens_per_micro_batch
        self.epochs, self.eval_batch_size = epochs, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = Path(cache_dir or "lightning_logs/.cache")
        self.tokenizer_source, self.tokenizer_revision = tokenizer, tokenizer_revision
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: PreparedData | None = None
        self._plan: DataPlan | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            if self.tokenizer_source is None:
                raise UserError(
                    "model.tokenizer: none given, and the model has no folder or hub name to take it from"
                )
            self._tokenizer = load_tokenizer(
                "model.tokenizer", self.tokenizer_source, self.tokenizer_revision
            )
        return self._tokenizer

    @property
    def plan(self) -> DataPlan:
        """What the run will do, known after ``setup``."""
        assert self._plan is not None, "the plan is made in setup()"
        return self._plan

    def prepare_data(self) -> None:
        """Read, split and tokenize, or open the cache: before weights load and before processes start."""
        if self._prepared is None:
            self._prepared = prepare(self.sources, self.tokenizer, self.options, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Plan the steps; ``trainer.max_steps`` cuts the epochs short."""
        self._plan = self.make_plan(self.trainer.max_steps if self.trainer is not None else -1)

    def make_plan(self, max_steps: int = -1) -> DataPlan:
        """Count what the run will see and how many steps it takes.

        Args:
            max_steps: The trainer's limit; -1 for none.
        """
        self.prepare_data()
        assert self._prepared is not None
        rows = self._prepared.rows
        steps_per_epoch = -(-rows_per_epoch(_column(rows["train"], "weight")) // self.batch_size)
        epochs = self.epochs or (1 if max_steps < 0 else -(-max_steps // steps_per_epoch))
        planned_steps = epochs * steps_per_epoch
        lengths = {split: self.lengths(split) for split in rows}
        return DataPlan(
            num_rows={split: len(part) for split, part in rows.items()},
            num_tokens={split: int(of_rows.sum()) for split, of_rows in lengths.items()},
            num_supervised={
                split: int(_column(part, "num_supervised").sum()) for split, part in rows.items()
            },
            longest_row={split: int(of_rows.max()) for split, of_rows in lengths.items()},
            max_length=self.options.max_length,
            batch_size=self.batch_size,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch,
            steps_per_epoch=steps_per_epoch,
            num_steps=planned_steps if max_steps < 0 else min(planned_steps, max_steps),
            planned_steps=planned_steps,
            largest_token_id=max(_largest_id(part) for part in rows.values()),
            notes=list(self._prepared.notes),
        )

    def cap_length(self, positions: int | None) -> None:
        """Hold ``max_length`` to the model's positions, before anything is tokenized.

        Raises:
            UserError: The user asked for longer rows than the model has positions.
        """
        if positions is None or self._prepared is not None:
            return
        if self.max_length is not None and self.max_length > positions:
            raise UserError(
                f"data.max_length: {self.max_length} is more than the model's {positions} positions; "
                f"set --data.max_length {positions} or less"
            )
        self.options = replace(self.options, max_length=min(self.options.max_length, positions))

    def rows(self, split: str) -> Dataset:
        """Return the encoded rows of a split (``input_ids``, ``labels``, ``row_id`` ...).

        Raises:
            UserError: The run has no such split.
        """
        self.prepare_data()
        assert self._prepared is not None
        if split not in self._prepared.rows:
            have = ", ".join(self._prepared.rows)
            raise UserError(
                f"data.split: there is no {split} split (the data has {have}), so there is nothing to {split}"
            )
        return self._prepared.rows[split]

    def lengths(self, split: str) -> np.ndarray:
        """Return the number of tokens of each row of a split."""
        return pc.list_value_length(self.rows(split).data.column("input_ids")).to_numpy()

    def train_dataloader(self) -> StepLoader:
        rows = self.rows("train")
        sampler = StepSampler(
            _column(rows, "weight"),
            batch_size=self.batch_size,
            num_steps=self.plan.num_steps,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        return StepLoader(_view(rows), sampler, self._collator(), num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation_loader("validation") if "validation" in self.plan.num_rows else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        batches = evaluation_batches(
            self.lengths(split),
            self.eval_batch_size,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        return DataLoader(
            _view(self.rows(split)),
            batch_sampler=batches,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
        )

    def _collator(self) -> SFTCollator:
        return SFTCollator(int(self.tokenizer.pad_token_id))


def _view(rows: Dataset) -> Dataset:
    return rows.select_columns(["input_ids", "labels", "row_id"]).with_format("numpy")


def _column(rows: Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()


def _largest_id(rows: Dataset) -> int:
    return int(pc.max(pc.list_flatten(rows.data.column("input_ids"))).as_py())


def _sources(
    path: str | dict[str, str] | None,
    sources: list[Source] | None,
    format: FormatName | None,
    prompt: str | None,
    completion: str | None,
    revision: str | None,
) -> list[Source]:
    if (path is None) == (sources is None):
        given = "both" if path is not None else "neither"
        raise UserError(f"data.path, data.sources: give one of them, {given} given")
    if path is not None:
        return [
            Source(path, format=format, prompt=prompt, completion=completion, revision=revision)
        ]
    if format is not None or prompt is not None or completion is not None or revision is not None:
        raise UserError(
            "data.format, data.prompt, data.completion, data.revision: with data.sources, set them per source"
        )
    if not sources:
        raise UserError("data.sources: the list is empty")
    wrong = [source.label for source in sources if not 0 < source.weight < float("inf")]
    if wrong:
        raise UserError(f"data.sources: the weight of {', '.join(wrong)} must be above 0")
    return sources


def _check_sizes(sizes: dict[str, int | None]) -> None:
    problems = [
        f"data.{key}: must be at least 1, got {size}"
        for key, size in sizes.items()
        if size is not None and size < 1
    ]
    if problems:
        raise UserError(*problems)
