"""Cutting a step into micro-batches, and padding."""

from fine_tune.batches import cut_by_tokens
from fine_tune.data.collate import SFTCollator
from fine_tune.losses import IGNORE_INDEX


def test_rows_are_cut_by_padded_tokens() -> None:
    assert cut_by_tokens([5, 4, 2, 2], 8) == [slice(0, 1), slice(1, 3), slice(3, 4)]


def test_without_a_budget_the_step_is_one_micro_batch() -> None:
    assert cut_by_tokens([5, 4], None) == [slice(0, 2)]


def test_a_row_over_the_budget_goes_alone() -> None:
    assert cut_by_tokens([10, 3, 1], 4) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_no_rows_no_micro_batches() -> None:
    assert cut_by_tokens([], 8) == []


def test_collator_puts_the_longest_first_and_masks_padding() -> None:
    rows = [
        {"input_ids": [1, 2], "labels": [IGNORE_INDEX, 2], "row_id": 7},
        {"input_ids": [3, 4, 5], "labels": [IGNORE_INDEX, 4, 5], "row_id": 9},
    ]
    batch = SFTCollator(pad_token_id=2)(rows)
    assert batch["input_ids_BT"].tolist() == [[3, 4, 5], [1, 2, 2]]
    assert batch["labels_BT"].tolist() == [[-100, 4, 5], [-100, 2, -100]]
    assert batch["lengths"] == [3, 2]
    assert batch["num_supervised"] == [2, 1]
    assert batch["row_ids"] == [9, 7]
