"""Row order: a pure function of (seed, epoch, step), whole epochs, weights, ranks."""

import numpy as np

from fine_tune.data.steps import StepSampler, epoch_order, evaluation_batches, rows_per_epoch


def sampler(num_steps: int, rank: int = 0, world_size: int = 1, rows: int = 10) -> StepSampler:
    return StepSampler(
        np.ones(rows), batch_size=4, num_steps=num_steps, seed=1, rank=rank, world_size=world_size
    )


def test_an_epoch_holds_every_row_once() -> None:
    steps = list(sampler(3))
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(row for step in steps for row in step) == list(range(10))


def test_epochs_differ_and_repeat_with_the_same_seed() -> None:
    first, second = epoch_order(np.ones(50), 1, 0), epoch_order(np.ones(50), 1, 1)
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_order(np.ones(50), 1, 0).tolist()
    assert first.tolist() != epoch_order(np.ones(50), 2, 0).tolist()


def test_starting_at_a_step_gives_the_same_rows() -> None:
    straight, resumed = list(sampler(8)), sampler(8)
    resumed.start = 5
    assert list(resumed) == straight[5:]


def test_a_far_position_needs_no_replay() -> None:
    far = sampler(10**9)
    assert far.rows_of_step(10**8).tolist() == far.rows_of_step(10**8).tolist()


def test_ranks_share_a_step_without_overlap() -> None:
    both = [list(sampler(3, rank, 2)) for rank in (0, 1)]
    for step, whole in enumerate(sampler(3)):
        assert sorted(both[0][step] + both[1][step]) == sorted(whole)


def test_weights_say_how_often_a_row_is_seen() -> None:
    weights = np.array([2.0] * 4 + [0.5] * 6)
    assert rows_per_epoch(weights) == 11
    counts = np.bincount(epoch_order(weights, 0, 0), minlength=10)
    assert counts[:4].tolist() == [2, 2, 2, 2]
    assert counts[4:].sum() == 3
    other = np.bincount(epoch_order(weights, 0, 1), minlength=10)
    assert counts[4:].tolist() != other[4:].tolist()


def test_evaluation_gives_every_rank_as_many_batches_and_every_row_once() -> None:
    lengths = np.array([3, 9, 1, 7, 5])
    ranks = [evaluation_batches(lengths, 2, rank, 2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 2
    assert sorted(row for batches in ranks for batch in batches for row in batch) == [0, 1, 2, 3, 4]
    assert ranks[0][0][0] == 1  # the longest row comes first
