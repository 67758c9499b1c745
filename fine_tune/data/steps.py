"""Which rows make step s: a pure function of (seed, epoch, step), so resuming is a computation, not a replay."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fine_tune.data.row_loader import RowLoader


def rows_per_epoch(weights: np.ndarray) -> int:
    """Count the rows one data epoch holds: ``round(weight * rows)`` for the rows of each weight."""
    values, counts = np.unique(weights, return_counts=True)
    return int(
        sum(round(float(value) * int(count)) for value, count in zip(values, counts, strict=True))
    )


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Order the rows of one data epoch.

    Of the rows of weight w, each is seen ``floor(w)`` times, and a share ``w - floor(w)`` of them, another one in
    every epoch, once more.

    Args:
        weights: Weight of each row.
        seed: The run's data seed.
        epoch: Data epoch, from 0.

    Returns:
        ``rows_per_epoch(weights)`` row indices in the order they are trained on.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    drawn = []
    for value in np.unique(weights):
        rows = np.flatnonzero(weights == value)
        whole = int(value)
        extra = round(float(value) * len(rows)) - whole * len(rows)
        drawn += [rows] * whole + [rng.permutation(rows)[:extra]]
    return rng.permutation(np.concatenate(drawn))


def spread(lengths: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Spread the rows of a step over ranks so that they finish together: the longest first, to whoever has least.

    Args:
        lengths: Tokens of each row.
        world_size: Number of ranks.

    Returns:
        The places of each rank's rows in ``lengths``; in total at most 4/3 of the least possible longest wait
        (Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    ranks = [(0, 0, rank) for rank in range(world_size)]  # tokens, rows, rank
    places: list[list[int]] = [[] for _ in ranks]
    for place in np.argsort(-lengths, kind="stable").tolist():
        tokens, rows, rank = ranks[0]
        places[rank].append(place)
        heapq.heapreplace(ranks, (tokens + int(lengths[place]), rows + 1, rank))
    return [np.array(of_rank, dtype=np.int64) for of_rank in places]


class StepSampler:
    """Give the rows of every optimizer step of the run to this rank.

    Args:
        weights: Weight of each training row (see ``epoch_order``).
        batch_size: Rows per step over all ranks; the last step of an epoch may hold fewer.
        num_steps: Optimizer steps of the run.
        seed: The run's data seed.
        rank: This process, of ``world_size``.
        world_size: Number of processes.
        difficulties: Rows are taken from the lowest up, equal ones in each epoch's order; None: in that order alone.
        lengths: Tokens of each training row, by which a step's rows are spread over ranks; None: in turn.
    """

    def __init__(
        self,
        weights: np.ndarray,
        *,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        difficulties: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.lengths = lengths
        self.weights, self.seed, self.difficulties = weights, seed, difficulties
        self.batch_size, self.num_steps = batch_size, num_steps
        self.steps_per_epoch = -(-rows_per_epoch(weights) // batch_size)
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __len__(self) -> int:
        return self.num_steps

    def rows_of_step(self, step: int, order: np.ndarray | None = None) -> np.ndarray:
        """Return the row indices of a step (from 0) over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self.order_of(epoch) if order is None else order
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def order_of(self, epoch: int) -> np.ndarray:
        """Return the row indices of an epoch, in the order they are trained on."""
        order = epoch_order(self.weights, self.seed, epoch)
        if self.difficulties is None:
            return order
        return order[np.argsort(self.difficulties[order], kind="stable")]

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.num_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order_of(epoch)
            yield self.own_rows(self.rows_of_step(step, order)).tolist()

    def own_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return those of a step's rows that are this rank's."""
        if self.world_size == 1 or self.lengths is None:
            return rows[self.rank :: self.world_size]
        return rows[spread(self.lengths[rows], self.world_size)[self.rank]]


class StepLoader:
    """A data loader whose state is the number of steps it has handed over.

    Args:
        rows: Encoded rows, indexable by a list of indices.
        sampler: Which rows make each step.
        collate: Rows of a step to a batch.
        num_workers: Processes that prepare batches ahead; 0 prepares them in this process.
    """

    def __init__(
        self,
        rows: Dataset[Any],
        sampler: StepSampler,
        collate: Callable[[Sequence[dict[str, Any]]], Any],
        *,
        num_workers: int = 0,
    ) -> None:
        self.rows, self.sampler, self.collate, self.num_workers = (
            rows,
            sampler,
            collate,
            num_workers,
        )
        self.num_handed_over = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.start = self.num_handed_over
        loader: RowLoader[Any] = RowLoader(
            self.rows,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            self.num_handed_over += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"num_handed_over": self.num_handed_over}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_handed_over = state["num_handed_over"]


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Cut the rows of an evaluation split, longest first, into the same number of batches on every rank."""
    order = np.argsort(-lengths, kind="stable")
    mine = order[rank::world_size]
    num_batches = -(-len(order[::world_size]) // batch_size)  # rank 0 holds the most rows
    return [mine[i * batch_size : (i + 1) * batch_size].tolist() for i in range(num_batches)]
