"""The data modules that users name: what each reads, and its settings."""

from fine_tune.data.checks import check_settings, listed_sources, pair_sources
from fine_tune.data.choices import LENGTH_LIMIT
from fine_tune.data.collate import PreferenceCollator, SFTCollator
from fine_tune.data.encode import AssistantTurns, Truncation
from fine_tune.data.formats import FormatName
from fine_tune.data.loader_settings import LoaderSettings, MicroBatch, number_of
from fine_tune.data.options import EmptyCompletions, Options, Split
from fine_tune.data.sources import Source
from fine_tune.data.step_data import StepData


class SFTData(StepData):
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
            result stays the same. None: 8 rows of ``max_length``, fewer for long rows or on a CPU. auto: what
            fits with 10 % of the memory to spare (see ``plan``).
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
        predict_path: Rows that ``predict`` answers, a path like ``path``; only the prompt's fields are needed.
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
        max_tokens_per_micro_batch: MicroBatch = None,
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
        predict_path: str | None = None,
    ) -> None:
        listed = listed_sources(path, sources, format, prompt, completion, revision)
        sizes = {
            "batch_size": batch_size,
            "max_tokens_per_micro_batch": number_of(max_tokens_per_micro_batch),
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
        options = Options(
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
        super().__init__(
            listed,
            options,
            collator=SFTCollator,
            columns=("input_ids", "labels", "row_id"),
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


class PreferenceData(StepData):
    """Pairs of a chosen and a rejected answer to the same prompt, for DPO and its relatives.

    Args:
        path: A file (.jsonl, .json, .csv, .parquet, .txt), a folder, a saved ``datasets`` folder, a hub name, or one
            of these per split: ``{train: a.jsonl, validation: b.jsonl, test: c.jsonl}``.
        sources: Several sources, each with path, weight, prompt, chosen, rejected; instead of ``path``.
        prompt: Template of the prompt over a row's fields, like ``"Question: {question}"``. None: the field prompt, or,
            without one, what chosen and rejected begin with.
        chosen: Template of the better answer, like ``" {chosen}"``; the stop token is added. None: the field chosen, a
            text or a list of messages.
        rejected: Template of the worse answer, likewise.
        split: Ratios ``{train: 0.8, validation: 0.1, test: 0.1}`` by a hash of the prompt (the default for data
            without splits), row counts ``{validation: 500, test: 500}``, ``existing``, or ``none`` (all rows train).
        group_by: Field whose equal values stay on one side of a split, like a conversation's id. None: the prompt.
        stratify_by: Field whose values get the same share in every split, like a topic; sizes are exact then.
        batch_size: Pairs per optimizer step, over all ranks. None: 8, or more for very long ones.
        max_tokens_per_micro_batch: Padded tokens per forward pass on one device: lower it when memory is short, the
            result stays the same. None: 8 rows of ``max_length``, fewer for long rows or on a CPU. auto: what
            fits with 10 % of the memory to spare (see ``plan``).
        max_length: Tokens a prompt may have together with either answer. None: the longest training pair's up to a
            multiple of 128, within the model's positions and 32,768.
        truncation: Longer pairs: ``prompt_left`` cuts the prompt's beginning, ``completion_right`` the answers' ends,
            ``drop`` leaves them out. Counted and printed.
        epochs: Passes over the training rows. None: 1, or as many as ``trainer.max_steps`` takes.
        near_duplicates: Jaccard similarity of word pairs from which two rows are near-duplicates, searched between and
            within splits. 1: only those with the same words.
        drop_leaked: Leave training rows out that stand, exactly or nearly, in validation or test.
        empty_completions: Pairs with an empty answer, or with twice the same: ``error`` refuses them, ``drop`` leaves
            them out.
        max_rows: At most so many rows per split of each source (the first ones): ``{train: 5000}``, or one number.
        eval_batch_size: Rows per validation or test batch; the result does not depend on it. None: ``batch_size``.
        num_workers: Processes that prepare batches ahead, per device.
        seed: Decides the order of the rows; the splits do not depend on it.
        revision: Revision of a hub data set.
        cache_dir: Where prepared tokens are kept. None: ``.cache`` beside the runs.
        tokenizer: Folder or hub name; set from the model's by the command line.
        tokenizer_revision: Its revision on the hub; set likewise.
        predict_path: Rows that ``predict`` answers, or scores by a reward model, a path like ``path``.
    """

    def __init__(
        self,
        path: str | dict[str, str] | None = None,
        sources: list[Source] | None = None,
        prompt: str | None = None,
        chosen: str | None = None,
        rejected: str | None = None,
        split: Split | None = None,
        group_by: str | None = None,
        stratify_by: str | None = None,
        batch_size: int | None = None,
        max_tokens_per_micro_batch: MicroBatch = None,
        max_length: int | None = None,
        truncation: Truncation = "prompt_left",
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
        predict_path: str | None = None,
    ) -> None:
        listed = pair_sources(path, sources, prompt, chosen, rejected, revision)
        sizes = {
            "batch_size": batch_size,
            "max_tokens_per_micro_batch": number_of(max_tokens_per_micro_batch),
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
        options = Options(
            max_length=max_length,
            length_cap=LENGTH_LIMIT,
            truncation=truncation,
            assistant_turns="last",
            split=split,
            group_by=group_by,
            stratify_by=stratify_by,
            max_rows=limits,
            empty_completions=empty_completions,
            near_duplicates=near_duplicates,
            drop_leaked=drop_leaked,
        )
        super().__init__(
            listed,
            options,
            collator=PreferenceCollator,
            columns=("input_ids", "labels", "row_id", "num_prompt", "num_chosen", "margin"),
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
