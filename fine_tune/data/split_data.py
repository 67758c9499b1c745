"""Rows that are read, split and tokenized once; those of the test split stay sealed until ``test`` opens them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from fine_tune.data.choices import LENGTH_LIMIT
from fine_tune.data.encode_rows import token_counts
from fine_tune.data.loader_settings import LoaderSettings
from fine_tune.data.options import Options
from fine_tune.data.origins import data_content, locate_rows
from fine_tune.data.prepare import prepare
from fine_tune.data.sealed import SEALED, SealedTest
from fine_tune.data.sources import Source
from fine_tune.data.token_cache import PreparedData
from fine_tune.errors import UserError
from fine_tune.models import load_tokenizer


class SplitData(LightningDataModule):
    """Base of ``StepData``: the encoded rows of each split.

    Args:
        sources: Where rows come from.
        options: What decides their tokens and splits.
        settings: ``cache_dir``, ``tokenizer`` and ``tokenizer_revision`` of them.
    """

    def __init__(self, sources: list[Source], options: Options, settings: LoaderSettings) -> None:
        super().__init__()
        self.sources, self.options = sources, options
        self.cache_dir = Path(settings.cache_dir or "lightning_logs/.cache")
        self.tokenizer_source = settings.tokenizer
        self.tokenizer_revision = settings.tokenizer_revision
        self.vocabulary_size: int | None = None  # the model's
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: PreparedData | None = None
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

    def meet_model(self, positions: int | None, vocabulary_size: int | None) -> None:
        """Hold ``max_length`` to the model's positions, before anything is tokenized, and note what it chooses from.

        Args:
            positions: The longest row it takes; None: any.
            vocabulary_size: Of its logits, which may be more than the tokenizer's; None: the same.

        Raises:
            UserError: The user asked for longer rows than the model has positions.
        """
        self.vocabulary_size = vocabulary_size
        if positions is None or self._prepared is not None:
            return
        asked = self.options.max_length
        if asked is not None and asked > positions:
            raise UserError(
                f"data.max_length: {asked} is more than the model's {positions} positions; "
                f"set --data.max_length {positions} or less"
            )
        self.options = replace(self.options, length_cap=min(LENGTH_LIMIT, positions))

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
        """Open the test split for ``test``, and seal it for as long as ``fit`` goes on.

        Raises:
            UserError: The test split was asked for while training goes on.
        """
        if stage == "test":
            if self._fitting:
                raise UserError(f"data: {SEALED}")
            first = self.trainer is None or self.trainer.is_global_zero
            sealed = self.prepared.test
            self._test_rows = sealed.open(counted=first) if sealed is not None else None
        elif stage == "fit":
            self._fitting, self._test_rows = True, None
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
