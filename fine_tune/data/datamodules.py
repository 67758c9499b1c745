"""The LightningDataModule: prepares rows, plans the run's steps, and hands out one batch per optimizer step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fine_tune.batches import DataPlan, SFTBatch
from fine_tune.data.checks import check_settings, listed_sources
from fine_tune.data.choices import LENGTH_LIMIT, choose
from fine_tune.data.collate import SFTCollator
from fine_tune.data.encode import AssistantTurns, Truncation
from fine_tune.data.encode_rows import column, token_counts
from fine_tune.data.formats import FormatName
from fine_tune.data.options import EmptyCompletions, Options, Split
from fine_tune.data.origins import data_content, locate_rows
from fine_tune.data.prepare import prepare
from fine_tune.data.sealed import SEALED, SealedTest
from fine_tune.data.sources import Source
from fine_tune.data.steps import (
    StepLoader,
    StepSampler,
    evaluation_batches,
    leave_sigterm_to_parent,
    rows_per_epoch,
)
from fine_tune.data.token_cache import PreparedData
from fine_tune.errors import UserError
from fine_tune.models import load_tokenizer


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
        group_by: Field whose equal values stay on one side of a split, like a conversation's id. None: the prompt.
        stratify_by: Field whose values get the same share in every split, like a topic; sizes are exact then.
        batch_size: Rows per optimizer step, over all ranks. None: 8, or more for very long rows.
        max_tokens_per_micro_batch: Padded tokens per forward pass on one device: lower it when memory is short, the
            result stays the same. None: 8 rows of ``max_length``, fewer for long rows.
        max_length: Tokens a row may have. None: the longest training row up to a multiple of 128, within the model's
            positions and 32,768.
        truncation: Longer rows: ``prompt_left`` cuts the prompt's beginning, ``completion_right`` the end, ``drop``
            leaves them out. Counted and printed.
        assistant_turns: Which assistant turns of a conversation carry loss: all, or the last.
        epochs: Passes over the training rows. None: 1, or as many as ``trainer.max_steps`` takes.
        near_duplicates: Jaccard similarity of word pairs from which two rows are near-duplicates, searched between and
            within splits. 1: only those with the same words.
        drop_leaked: Leave training rows out that stand, exactly or nearly, in validation or test.
        empty_completions: Rows without an answer: ``error`` refuses them, ``drop`` leaves them out.
        max_rows: At most so many rows per split of each source (the first ones): ``{train: 5000}``, or one number.
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
        split: Split | None = None,
        group_by: str | None = None,
        stratify_by: str | None = None,
        batch_size: int | None = None,
        max_tokens_per_micro_batch: int | None = None,
        max_length: int | None = None,
        truncation: Truncation = "prompt_left",
        assistant_turns: AssistantTurns = "all",
        epochs: int | None = None,
        near_duplicates: float = 0.7,
        drop_leaked: bool = False,
        empty_completions: EmptyCompletions = "error",
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
        self.sources = listed_sources(path, sources, format, prompt, completion, revision)
        sizes = {
            "batch_size": batch_size,
            "max_tokens_per_micro_batch": max_tokens_per_micro_batch,
            "max_length": max_length,
            "epochs": epochs,
            "eval_batch_size": eval_batch_size,
        }
        limits = check_settings(
            sizes,
            num_workers=num_workers,
            seed=seed,
            near_duplicates=near_duplicates,
            split=split,
            max_rows=max_rows,
        )
        self.options = Options(
            max_length=max_length,
            length_cap=LENGTH_LIMIT,
            truncation=truncation,
            assistant_turns=assistant_turns,
            split=split,
            group_by=group_by,
            stratify_by=stratify_by,
            max_rows=limits,
            empty_completions=empty_completions,
            near_duplicates=near_duplicates,
            drop_leaked=drop_leaked,
        )
        self.batch_size, self.max_tokens_per_micro_batch = batch_size, max_tokens_per_micro_batch
        self.epochs, self.eval_batch_size = epochs, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = Path(cache_dir or "lightning_logs/.cache")
        self.tokenizer_source, self.tokenizer_revision = tokenizer, tokenizer_revision
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: PreparedData | None = None
        self._plan: DataPlan | None = None
        self._test_rows: Dataset | None = None
        self._fitting = False

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

    @property
    def prepared(self) -> PreparedData:
        """The rows and what preparation found out about them."""
        self.prepare_data()
        assert self._prepared is not None
        return self._prepared

    @property
    def content(self) -> dict[str, Any]:
        """What the training rows are made of, by content: what a resumed run is held against."""
        return data_content(self.sources, self.tokenizer, self.prepared.rows["train"])

    def locate_rows(self, row_ids: list[int]) -> list[str]:
        """Say where rows stand in their sources, as ``file:line`` where the format has lines."""
        return locate_rows(self.sources, row_ids)

    @property
    def sealed_test(self) -> SealedTest | None:
        """The sealed test split: its hash and its openings; its rows only while ``test`` runs."""
        return self.prepared.test

    def prepare_data(self) -> None:
        """Read, split and tokenize, or open the cache: before weights load and before processes start."""
        if self._prepared is None:
            self._prepared = prepare(self.sources, self.tokenizer, self.options, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Plan the steps (``trainer.max_steps`` cuts the epochs short); for ``test``, open the sealed test split.

        Raises:
            UserError: The test split was asked for while training goes on.
        """
        self._plan = self.make_plan(self.trainer.max_steps if self.trainer is not None else -1)
        if stage == "test":
            if self._fitting:
                raise UserError(f"data: {SEALED}")
            self._test_rows = self.prepared.test.open() if self.prepared.test else None
        self._fitting = self._fitting or stage == "fit"
        self._lock_test()

    def teardown(self, stage: str) -> None:
        """Close the test split again; fit's last step is behind when it comes here."""
        self._test_rows = None
        if stage == "fit":
            self._fitting = False
        self._lock_test()

    def _lock_test(self) -> None:
        if self.sealed_test is not None:
            self.sealed_test.locked = self._fitting

    def make_plan(self, max_steps: int = -1) -> DataPlan:
        """Count what the run will see and how many steps it takes.

        Args:
            max_steps: The trainer's limit; -1 for none.
        """
        prepared, counts = self.prepared, self.prepared.facts["splits"]
        cap = self.options.length_cap
        choices = choose(
            self.lengths("train"),
            longest_row=prepared.facts["audit"]["length"]["max"],
            max_length=prepared.max_length,
            length_cap=cap,
        )
        batch_size = self.batch_size or choices["data.batch_size"].value
        rows_of_epoch = rows_per_epoch(column(prepared.rows["train"], "weight"))
        steps_per_epoch = -(-rows_of_epoch // batch_size)
        epochs = self.epochs or (1 if max_steps < 0 else -(-max_steps // steps_per_epoch))
        planned_steps = epochs * steps_per_epoch
        return DataPlan(
            num_rows={split: of_split["num_rows"] for split, of_split in counts.items()},
            num_tokens={split: of_split["num_tokens"] for split, of_split in counts.items()},
            num_supervised={s: of_split["num_supervised"] for s, of_split in counts.items()},
            longest_row={split: of_split["longest_row"] for split, of_split in counts.items()},
            max_length=prepared.max_length,
            batch_size=batch_size,
            max_tokens_per_micro_batch=self.max_tokens_per_micro_batch
            or choices["data.max_tokens_per_micro_batch"].value,
            steps_per_epoch=steps_per_epoch,
            num_steps=planned_steps if max_steps < 0 else min(planned_steps, max_steps),
            planned_steps=planned_steps,
            largest_token_id=max(of_split["largest_token_id"] for of_split in counts.values()),
            test_hash=prepared.facts.get("test_hash"),
            choices=choices,
            notes=prepared.facts["notes"] + ["tokens from the cache"] * prepared.cached,
        )

    def cap_length(self, positions: int | None) -> None:
        """Hold ``max_length`` to the model's positions, before anything is tokenized.

        Raises:
            UserError: The user asked for longer rows than the model has positions.
        """
        if positions is None or self._prepared is not None:
            return
        asked = self.options.max_length
        if asked is not None and asked > positions:
            raise UserError(
                f"data.max_length: {asked} is more than the model's {positions} positions; "
                f"set --data.max_length {positions} or less"
            )
        self.options = replace(self.options, length_cap=min(LENGTH_LIMIT, positions))

    def rows(self, split: str) -> Dataset:
        """Return the encoded rows of a split (``input_ids``, ``labels``, ``row_id`` ...).

        Raises:
            UserError: The run has no such split, or it is the test split and nobody is testing.
        """
        if split not in self.prepared.facts["splits"]:
            have = ", ".join(self.prepared.facts["splits"])
            raise UserError(
                f"data.split: there is no {split} split (the data has {have}), so there is nothing to {split}"
            )
        if split != "test":
            return self.prepared.rows[split]
        if self._test_rows is None:
            raise UserError(f"data: {SEALED}")
        return self._test_rows

    def lengths(self, split: str) -> np.ndarray:
        """Return the number of tokens of each row of a split."""
        return token_counts(self.rows(split))

    def longest_rows(self, split: str) -> SFTBatch:
        """Return the worst batch of a split on this rank: as many of its longest rows as a batch holds."""
        ranks = self.trainer.world_size if self.trainer is not None else 1
        of_step = -(-self.plan.batch_size // ranks)
        count = of_step if split == "train" else self.eval_batch_size or self.plan.batch_size
        longest = np.argsort(-self.lengths(split), kind="stable")[:count]
        rows = _view(self.rows(split))
        return self._collator()([rows[int(i)] for i in longest])

    def train_dataloader(self) -> StepLoader:
        rows = self.rows("train")
        sampler = StepSampler(
            column(rows, "weight"),
            batch_size=self.plan.batch_size,
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
            self.eval_batch_size or self.plan.batch_size,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        return DataLoader(
            _view(self.rows(split)),
            batch_sampler=batches,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            worker_init_fn=leave_sigterm_to_parent,
        )

    def _collator(self) -> SFTCollator:
        return SFTCollator(int(self.tokenizer.pad_token_id))


def _view(rows: Dataset) -> Dataset:
    return rows.select_columns(["input_ids", "labels", "row_id"]).with_format("numpy")
