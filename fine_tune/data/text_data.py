"""The data module of pretraining: documents packed into rows of one length."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fine_tune.data.checks import check_settings
from fine_tune.data.choices import LENGTH_LIMIT
from fine_tune.data.collate import TextCollator
from fine_tune.data.documents import Unit
from fine_tune.data.encode_rows import column
from fine_tune.data.loader_settings import LoaderSettings, MicroBatch, number_of
from fine_tune.data.options import Options, Split
from fine_tune.data.step_data import StepData
from fine_tune.data.text_prepare import TextSource, located, prepare_text
from fine_tune.errors import UserError

Curriculum = Literal["none", "length", "field"]
DEFAULT_LENGTH = 1024


class TextData(StepData):
    """Texts for training a language model from nothing, or for training one further.

    Documents are tokenized once, cut where they are longer than a row, and packed into rows by best fit; none sees
    another.

    Args:
        path: A file of texts (.txt, .jsonl, .json, .csv, .parquet), a folder of them, or one of these per split:
            ``{train: a.txt, validation: b.txt, test: c.txt}``.
        field: Where a row of JSON, CSV or Parquet holds its text.
        document: What is one document of a ``.txt``: a line, a paragraph (up to a blank line), or the whole file.
        split: Shares ``{train: 0.96, validation: 0.02, test: 0.02}`` of the documents by a hash of their words (the
            default for one path), so that the same document is on one side only; or ``none`` (all train).
        max_length: Tokens of a row. None: 1,024, or the model's positions if they are fewer.
        batch_size: Rows per optimizer step, over all ranks. None: 8.
        max_tokens_per_micro_batch: Padded tokens per forward pass on one device: lower it when memory is short, the
            result stays the same. None: 8 rows, fewer on a CPU. auto: what fits with 10 % of the memory to spare.
        epochs: Passes over the training rows. None: 1, or as many as ``trainer.max_steps`` takes.
        curriculum: none draws rows in a new order each epoch; length takes short documents first, field those with a
            small ``curriculum_field``: a row then holds documents that are alike, and is a little less full.
        curriculum_field: A number in every row of the data, like a year or a level.
        max_rows: At most so many documents per split (the first ones): ``{train: 5000}``, or one number.
        eval_batch_size: Rows per validation or test batch; the result does not depend on it. None: ``batch_size``.
        num_workers: Processes that prepare batches ahead, per device.
        seed: Decides the order of the rows; the splits do not depend on it.
        cache_dir: Where prepared tokens are kept. None: ``.cache`` beside the runs.
        tokenizer: Folder or hub name; set from the model's by the command line.
        tokenizer_revision: Its revision on the hub; set likewise.
        predict_path: Prompts that ``predict`` goes on writing.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        field: str = "text",
        document: Unit = "line",
        split: Split | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        max_tokens_per_micro_batch: MicroBatch = None,
        epochs: int | None = None,
        curriculum: Curriculum = "none",
        curriculum_field: str | None = None,
        max_rows: int | dict[str, int] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
        tokenizer: str | None = None,
        tokenizer_revision: str | None = None,
        predict_path: str | None = None,
    ) -> None:
        sizes = {
            "batch_size": batch_size,
            "max_tokens_per_micro_batch": number_of(max_tokens_per_micro_batch),
            "epochs": epochs,
            "eval_batch_size": eval_batch_size,
        }
        limits = check_settings(
            sizes,
            num_workers=num_workers,
            seed=seed,
            near_duplicates=1.0,
            split=split,
            max_rows=max_rows,
        )
        problems = _problems(path, split, max_length, curriculum, curriculum_field)
        if problems:
            raise UserError(*problems)
        sorted_by = {"none": None, "length": "length", "field": curriculum_field}[curriculum]
        self.text_source = TextSource(
            path, format="text", field=field, document=document, sorted_by=sorted_by
        )
        options = Options(
            max_length=max_length,
            length_cap=LENGTH_LIMIT,
            truncation="drop",  # nothing is cut away: a long document is several pieces
            assistant_turns="all",
            split="existing" if isinstance(path, dict) else split,
            group_by=None,
            stratify_by=None,
            max_rows=limits,
            empty_completions="drop",
            near_duplicates=1.0,
            drop_leaked=False,
        )
        super().__init__(
            [self.text_source],
            options,
            collator=TextCollator,
            columns=("input_ids", "pieces", "row_id"),
            settings=LoaderSettings(
                batch_size=batch_size,
                max_tokens_per_micro_batch=max_tokens_per_micro_batch,
                epochs=epochs,
                eval_batch_size=eval_batch_size,
                num_workers=num_workers,
                seed=seed,
                cache_dir=cache_dir,
                tokenizer=tokenizer,
                tokenizer_revision=tokenizer_revision,
                predict_path=predict_path,
            ),
        )

    def prepare_data(self) -> None:
        """Read, split, tokenize and pack, or open the cache: before weights load and before processes start."""
        if self._prepared is None and self.predict_rows is None:
            length = self.options.max_length or min(DEFAULT_LENGTH, self.options.length_cap)
            options = replace(self.options, max_length=length)
            self._prepared = prepare_text(self.text_source, self.tokenizer, options, self.cache_dir)

    def difficulties(self) -> np.ndarray | None:
        """Return what the curriculum sorts the training rows by; None without one."""
        if self.text_source.sorted_by is None:
            return None
        return column(self.rows("train"), "difficulty")

    def locate_rows(self, row_ids: list[int]) -> list[str]:
        """Say where the documents of training rows stand, as ``file:line`` where the format has lines."""
        rows = self.prepared.rows["train"]
        of_rows = {i: list(dict.fromkeys(rows[i]["documents"])) for i in set(row_ids)}
        places = located(self.text_source, {n for numbers in of_rows.values() for n in numbers})
        return [", ".join(places[number] for number in of_rows[i]) for i in row_ids]


def _problems(
    path: Any, split: Any, max_length: int | None, curriculum: str, curriculum_field: str | None
) -> list[str]:
    problems = []
    if max_length is not None and max_length < 2:
        problems.append(f"data.max_length: must be at least 2, got {max_length}")
    if isinstance(path, dict) and "train" not in path:
        problems.append(f"data.path: no train among {', '.join(path) or 'none'}")
    if isinstance(path, dict) and split is not None:
        problems.append("data.split: the path names the splits already; leave it out")
    if split == "existing" and not isinstance(path, dict):
        problems.append("data.split: existing: name them, data.path: {train: ..., validation: ...}")
    if isinstance(split, dict) and "train" not in split:
        problems.append("data.split: give shares of the documents, like {train: 0.96, ...}")
    if (curriculum == "field") != (curriculum_field is not None):
        problems.append(
            "data.curriculum, data.curriculum_field: a field is given with curriculum field, and with it only"
        )
    return problems
