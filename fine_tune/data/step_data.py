"""What all data modules share: the run's steps planned, one batch handed out per optimizer step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from fine_tune.batches import DataPlan
from fine_tune.data.choices import choose, cpu_tokens
from fine_tune.data.encode_rows import column
from fine_tune.data.loader_settings import LoaderSettings, number_of
from fine_tune.data.options import Options
from fine_tune.data.predict_loader import PredictLoader, predict_plan
from fine_tune.data.predict_rows import NO_ROWS, PredictRows, read_predict_rows
from fine_tune.data.row_loader import RowLoader
from fine_tune.data.sources import Source
from fine_tune.data.split_data import SplitData
from fine_tune.data.steps import StepLoader, StepSampler, evaluation_batches, rows_per_epoch
from fine_tune.errors import UserError


class StepData(SplitData):
    """Base of the data modules: rows that are ready to be handed out as the batches of optimizer steps.

    Args:
        sources: Where rows come from.
        options: What decides their tokens and splits.
        collator: Makes a batch of encoded rows, given the id that pads them.
        columns: What it needs of a row.
        settings: ``batch_size``, ``max_tokens_per_micro_batch``, ``epochs``, ``eval_batch_size``, ``num_workers``,
            ``seed``, ``cache_dir``, ``tokenizer``, ``tokenizer_revision``, ``predict_path``, as the subclass documents
            them.
    """

    def __init__(
        self,
        sources: list[Source],
        options: Options,
        *,
        collator: Callable[[int], Callable[[Any], Any]],
        columns: tuple[str, ...],
        settings: LoaderSettings,
    ) -> None:
        super().__init__(sources, options, settings)
        self.collator, self.columns = collator, list(columns)
        self.batch_size = settings.batch_size
        self.max_tokens_per_micro_batch = number_of(settings.max_tokens_per_micro_batch)
        self.fills_memory = settings.max_tokens_per_micro_batch == "auto"
        self.epochs, self.eval_batch_size = settings.epochs, settings.eval_batch_size
        self.num_workers, self.seed = settings.num_workers, settings.seed
        self._plan: DataPlan | None = None
        self.predict_path = settings.predict_path
        self.predict_rows: PredictRows | None = None
        self.rows_done: set[int] = set()  # of the rows to predict: the command line knows them

    @property
    def plan(self) -> DataPlan:
        """What the run will do, known after ``setup``."""
        assert self._plan is not None, "the plan is made in setup()"
        return self._plan

    def setup(self, stage: str) -> None:
        """Plan the steps (``trainer.max_steps`` cuts the epochs short), and open or seal the test split.

        Raises:
            UserError: The test split was asked for while training goes on.
        """
        if stage != "predict":
            self._plan = self.make_plan(self.trainer.max_steps if self.trainer is not None else -1)
            super().setup(stage)

    def teardown(self, stage: str) -> None:
        if stage != "predict":
            super().teardown(stage)

    def prepare_data(self) -> None:
        if self.predict_rows is None:
            super().prepare_data()

    def make_plan(self, max_steps: int = -1) -> DataPlan:
        """Count what the run will see and how many steps it takes.

        Args:
            max_steps: The trainer's limit; -1 for none.
        """
        prepared, counts = self.prepared, self.prepared.facts["splits"]
        cap = self.options.length_cap
        choices = choose(
            self.lengths("train"),
            longest_row=prepared.facts["audit"]["longest_sequence"],
            max_length=prepared.max_length,
            length_cap=cap,
            cpu_limit=None if torch.accelerator.is_available() else self.cpu_limit(),
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
            unread_margins=sum(
                int(np.isnan(column(rows, "margin")).sum()) for rows in prepared.rows.values()
            ),
            num_bytes=prepared.facts.get("num_bytes", {}),
            choices=choices,
            notes=prepared.facts["notes"] + ["tokens from the cache"] * prepared.cached,
        )

    def cpu_limit(self) -> int:
        """Return the tokens a CPU takes at a time, by the vocabulary and the share of tokens that have logits."""
        train = self.prepared.facts["splits"]["train"]
        share = train["num_supervised"] / max(1, train["num_tokens"])
        return cpu_tokens(self.vocabulary_size or len(self.tokenizer), share or 1.0)

    def difficulties(self) -> np.ndarray | None:
        """Return what the training rows are sorted by; None for a new order in every epoch."""
        return None

    def encoded(self, split: str) -> Dataset:
        """Return the encoded rows of a split with what a batch needs of each, as arrays."""
        return self._view(self.rows(split))

    def make_batch(self, rows: list[Any]) -> Any:
        """Return encoded rows as a batch."""
        return self._collator()(rows)

    def longest_rows(self, split: str) -> Any:
        """Return the worst batch of a split on this rank: as many of its longest rows as a batch holds."""
        ranks = self.trainer.world_size if self.trainer is not None else 1
        of_step = -(-self.plan.batch_size // ranks)
        count = of_step if split == "train" else self.eval_batch_size or self.plan.batch_size
        longest = np.argsort(-self.lengths(split), kind="stable")[:count]
        rows = self._view(self.rows(split))
        return self._collator()([rows[int(i)] for i in longest])

    def train_dataloader(self) -> StepLoader:
        rows = self.rows("train")
        several = self.trainer is not None and self.trainer.world_size > 1
        sampler = StepSampler(
            column(rows, "weight"),
            batch_size=self.plan.batch_size,
            num_steps=self.plan.num_steps,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
            difficulties=self.difficulties(),
            lengths=self.lengths("train") if several else None,
        )
        return StepLoader(self._view(rows), sampler, self._collator(), num_workers=self.num_workers)

    def val_dataloader(self) -> RowLoader[Any] | list[Any]:
        return self._evaluation_loader("validation") if "validation" in self.plan.num_rows else []

    def test_dataloader(self) -> RowLoader[Any]:
        return self._evaluation_loader("test")

    def read_predict_rows(self, max_length: int | None, max_new_tokens: int | None) -> PredictRows:
        """Read ``predict_path``, and plan for it alone: no other row is prepared.

        Args:
            max_length: Positions of the model; None for no limit.
            max_new_tokens: Tokens an answer may have; None where answers are scored.

        Raises:
            UserError: No rows are named, or they cannot be read.
        """
        if self.predict_path is None:
            raise UserError(NO_ROWS)
        self.predict_rows = read_predict_rows(
            self.predict_path,
            self.sources,
            self.options,
            self.tokenizer,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
        )
        tokens = self.max_tokens_per_micro_batch
        self._plan = predict_plan(self.predict_rows, max_new_tokens or 0, tokens)
        return self.predict_rows

    def predict_dataloader(self) -> PredictLoader:
        assert self.predict_rows is not None, "read_predict_rows() comes first"
        return PredictLoader(self.predict_rows, self.rows_done)

    def _evaluation_loader(self, split: str) -> RowLoader[Any]:
        batches = evaluation_batches(
            self.lengths(split),
            self.eval_batch_size or self.plan.batch_size,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        return RowLoader(
            self._view(self.rows(split)),
            batch_sampler=batches,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
        )

    def _collator(self) -> Callable[[Any], Any]:
        return self.collator(int(self.tokenizer.pad_token_id))

    def _view(self, rows: Dataset) -> Dataset:
        return rows.select_columns(self.columns).with_format("numpy")
