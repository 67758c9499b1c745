"""The arithmetic of the loss, written out."""

import math

import torch

from fine_tune.losses import IGNORE_INDEX, nll_sum, num_supervised_targets, supervised_targets


def test_prompt_and_last_position_carry_no_loss() -> None:
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 3, 1]])
    positions, targets = supervised_targets(labels, 2)
    assert positions.tolist() == [1, 2]
    assert targets.tolist() == [3, 1]
    loss_sum = nll_sum(torch.zeros(2, 5), targets)  # uniform over 5 tokens: ln 5 nats each
    torch.testing.assert_close(loss_sum, torch.tensor(2 * math.log(5)))


def test_positions_count_over_flattened_rows() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 7, IGNORE_INDEX], [IGNORE_INDEX, IGNORE_INDEX, 9]])
    positions, targets = supervised_targets(labels, 2)
    assert positions.tolist() == [0, 4]
    assert targets.tolist() == [7, 9]


def test_a_rows_first_token_is_predicted_by_nothing() -> None:
    assert num_supervised_targets([5, 6, 7]) == 2
    assert num_supervised_targets([IGNORE_INDEX, IGNORE_INDEX, 7]) == 1
    assert len(supervised_targets(torch.tensor([[5, 6, 7]]), 2)[1]) == 2


def test_half_precision_logits_are_summed_in_float32() -> None:
    loss = nll_sum(torch.zeros(3, 4, dtype=torch.bfloat16), torch.tensor([0, 1, 2]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(3 * math.log(4)))
